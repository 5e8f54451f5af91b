import { describe, expect, it } from "vitest";
import { parseOrientation, toUpright, UPRIGHT } from "../src/orientation";

const SIZE = { columns: 40, rows: 30 };

describe("an image that the box turned upright", () => {
  it("is upright unless the description says otherwise", () => {
    for (const value of [undefined, null, [], [true], "90", [1, 0, 0]]) {
      expect(parseOrientation(value)).toEqual(UPRIGHT);
    }
    expect(parseOrientation([true, false, true])).toEqual({ transpose: true, flipRows: false, flipColumns: true });
  });

  it.each([
    [UPRIGHT, [3, 5]],
    [{ transpose: false, flipRows: true, flipColumns: true }, [37, 25]],
    [{ transpose: true, flipRows: false, flipColumns: false }, [5, 3]],
    [{ transpose: true, flipRows: false, flipColumns: true }, [35, 3]],
    [{ transpose: true, flipRows: true, flipColumns: false }, [5, 27]],
  ])("%j moves a point", (orientation, expected) => {
    expect(toUpright([3, 5], orientation, SIZE)).toEqual(expected);
  });
});
