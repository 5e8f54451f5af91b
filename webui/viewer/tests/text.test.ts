// @vitest-environment node
import { describe, expect, it } from "vitest";
import words from "../TEXT_KEYS.json";
import { translator } from "../src/text";

describe("translator", () => {
  it("takes the text of the page, with its values filled in", () => {
    const t = translator({ lang: "en", text: { status_zoom: "{percent} of a hundred, {other}" } });
    expect(t("status_zoom", { percent: 50 })).toBe("50 of a hundred, {other}");
  });

  it("falls back to the text in the language of the page", () => {
    expect(translator({ lang: "zh", text: {} })("unit_mm")).toBe(words.unit_mm.zh);
    expect(translator({ lang: "en", text: {} })("error_title")).toBe(words.error_title.en);
    expect(translator({ lang: "fr" as "en", text: {} })("error_title")).toBe(words.error_title.en);
  });

  it("has the same values in both languages", () => {
    const names = (text: string) => [...text.matchAll(/\{\w+\}/g)].map(String).sort();
    for (const [key, { en, zh }] of Object.entries(words)) {
      expect(names(zh), key).toEqual(names(en));
    }
  });
});
