import { beforeEach, describe, expect, it } from "vitest";
import { closeMenuOnLeave, storeTimeZone } from "../src/pages/page";
import { useFreshPage } from "./support";

useFreshPage();

describe("storeTimeZone", () => {
  it("sends the time zone of the browser to the box in a cookie", () => {
    storeTimeZone();
    expect(document.cookie).toContain(`tz=${Intl.DateTimeFormat().resolvedOptions().timeZone}`);
  });
});

describe("closeMenuOnLeave", () => {
  let menu: HTMLDetailsElement;
  beforeEach(() => {
    document.body.innerHTML = '<details class="user" open><summary>me</summary><a href="#">Password</a></details><p>else</p>';
    menu = document.querySelector("details") as HTMLDetailsElement;
    closeMenuOnLeave(menu);
  });

  it("stays open at a click inside and closes at one outside", () => {
    menu.querySelector("a")?.click();
    expect(menu.open).toBe(true);
    document.querySelector("p")?.click();
    expect(menu.open).toBe(false);
  });

  it("closes at Escape, with the focus on its button", () => {
    menu.dispatchEvent(new KeyboardEvent("keydown", { key: "Tab" }));
    expect(menu.open).toBe(true);
    menu.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    expect(menu.open).toBe(false);
    expect(document.activeElement).toBe(menu.querySelector("summary"));
  });
});
