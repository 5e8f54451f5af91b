import { beforeEach, describe, expect, it } from "vitest";
import { actionFor, type Action } from "../src/actions";

beforeEach(() => {
  document.body.innerHTML = '<div id="stage"></div><input id="field"><button id="button"></button><dialog><p id="inside"></p></dialog>';
});

function press(id: string, key: string, options: KeyboardEventInit = {}): Action | number | null {
  let action: Action | number | null = null;
  const target = document.getElementById(id) as HTMLElement;
  target.addEventListener("keydown", (event) => (action = actionFor(event)), { once: true });
  target.dispatchEvent(new KeyboardEvent("keydown", { key, ...options }));
  return action;
}

describe("actionFor", () => {
  it.each<[string, Action | number | null]>([
    ["w", "modeWindow"], ["W", "modeWindow"], ["【", "narrower"], ["ArrowLeft", "panLeft"], ["3", 3], ["？", "help"], ["z", null],
  ])("%s on the stage is %s", (key, action) => {
    expect(press("stage", key)).toBe(action);
  });

  it("leaves the keys of the browser, of fields, buttons and dialogs to them", () => {
    expect(press("stage", "r", { ctrlKey: true })).toBeNull();
    expect(press("field", "ArrowLeft")).toBeNull();
    expect(press("field", "h")).toBe("heatmap");
    expect(press("button", "Enter")).toBeNull();
    expect(press("inside", "w")).toBeNull();
  });
});
