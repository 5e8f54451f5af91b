/**
 * The words on the screen, from TEXT_KEYS.json in the language of the page. A page may replace some of them
 * (`config.text`).
 */
import words from "../TEXT_KEYS.json";
import type { ViewerConfig } from "./types";

export type TextKey = keyof typeof words;
export type Translate = (key: TextKey, values?: Readonly<Record<string, string | number>>) => string;

/** The function that gives the text of a key, with `{name}` replaced by its value. */
export function translator(config: Pick<ViewerConfig, "lang" | "text">): Translate {
  const lang = config.lang === "zh" ? "zh" : "en";
  return (key, values = {}) => {
    const template = config.text[key] ?? words[key][lang];
    return template.replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole));
  };
}
