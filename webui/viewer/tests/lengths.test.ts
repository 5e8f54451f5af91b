// @vitest-environment node
import { describe, expect, it } from "vitest";
import { Lengths } from "../src/lengths";
import { english, meta } from "./measures";

function measured(lengths: Lengths, frame: number, from: [number, number], to: [number, number]): void {
  lengths.start(from);
  lengths.move(to);
  lengths.finish(frame);
}

describe("Lengths", () => {
  it("are in millimetres by the spacing of rows and columns", () => {
    const lengths = new Lengths(english);
    measured(lengths, 0, [0, 0], [30, 40]);
    expect(lengths.marks(0, meta({ spacing: [0.5, 0.1] }))).toMatchObject([{ text: "20.2 mm", open: false }]);
  });

  it("are in pixels without a spacing", () => {
    const lengths = new Lengths(english);
    measured(lengths, 0, [0, 0], [30, 40]);
    expect(lengths.marks(0, meta())[0]?.text).toMatch(/^50 /);
  });

  it("belong to their frame", () => {
    const lengths = new Lengths(english);
    measured(lengths, 2, [0, 0], [30, 40]);
    expect([lengths.count(0), lengths.count(2)]).toEqual([0, 1]);
  });

  it("are dropped when shorter than two pixels", () => {
    const lengths = new Lengths(english);
    measured(lengths, 0, [5, 5], [6, 6]);
    expect(lengths.count(0)).toBe(0);
  });

  it("show the one being drawn until it is cancelled", () => {
    const lengths = new Lengths(english);
    lengths.start([0, 0]);
    expect(lengths.drawing).toBe(true);
    expect(lengths.marks(0, meta())).toMatchObject([{ open: true }]);
    lengths.cancel();
    expect(lengths.marks(0, meta())).toEqual([]);
    lengths.move([9, 9]);
    lengths.finish(0);
    expect(lengths.count(0)).toBe(0);
  });

  it("are removed one by one, or all of a frame", () => {
    const lengths = new Lengths(english);
    for (const end of [10, 20, 30]) {
      measured(lengths, 0, [0, 0], [end, 0]);
    }
    lengths.removeLast(0);
    expect(lengths.marks(0, meta()).map(({ to }) => to[0])).toEqual([10, 20]);
    lengths.clear(0);
    expect(lengths.count(0)).toBe(0);
  });
});
