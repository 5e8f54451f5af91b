import { describe, expect, it } from "vitest";
import { chosenFiles, droppedFiles, fingerprint, isPicture } from "../src/uploadFiles";

const file = (name: string, bytes: number[] = []) => new File([new Uint8Array(bytes)], name, { lastModified: 1 });

type Entry = { isFile: boolean; fullPath: string; file?: unknown; createReader?: unknown };

function fileEntry(path: string): Entry {
  return { isFile: true, fullPath: path, file: (done: (file: File) => void) => done(file(path)) };
}

/** A folder whose entries come in portions, as browsers give them. */
function folderEntry(path: string, ...portions: Entry[][]): Entry {
  const left = [...portions, []];
  return { isFile: false, fullPath: path, createReader: () => ({ readEntries: (done: (entries: unknown) => void) => done(left.shift() ?? []) }) };
}

function dropped(...entries: Entry[]): DataTransfer {
  return { items: entries.map((entry) => ({ kind: "file", webkitGetAsEntry: () => entry })), files: [] } as unknown as DataTransfer;
}

describe("files", () => {
  it("of an input keep the path of their folder", () => {
    const inner = file("1.dcm");
    Object.defineProperty(inner, "webkitRelativePath", { value: "disc/1.dcm" });
    expect(chosenFiles([inner, file("2.dcm")] as unknown as FileList).map(({ name }) => name)).toEqual(["disc/1.dcm", "2.dcm"]);
  });

  it("that were dropped are read to the bottom of their folders, in all portions", async () => {
    const inner = folderEntry("/disc/inner", [fileEntry("/disc/inner/3.dcm")]);
    const found = await droppedFiles(dropped(fileEntry("/1.dcm"), folderEntry("/disc", [fileEntry("/disc/2.dcm")], [inner])));
    expect(found.map(({ name }) => name)).toEqual(["1.dcm", "disc/2.dcm", "disc/inner/3.dcm"]);
  });

  it("that a script dropped have no entries", async () => {
    const data = { items: [], files: [file("1.dcm")] } as unknown as DataTransfer;
    expect((await droppedFiles(data)).map(({ name }) => name)).toEqual(["1.dcm"]);
  });
});

describe("isPicture", () => {
  it.each([
    ["film.dcm", [0x89, 0x50, 0x4e, 0x47, 1], true],
    ["film.dcm", [0xff, 0xd8, 0xff, 0xe0], true],
    ["scan.png", [0, 0, 0, 0], false],
    ["empty.png", [], false],
  ])("goes by the first bytes, not by the name: %s %j", async (name, bytes, expected) => {
    expect(await isPicture(file(name, bytes))).toBe(expected);
  });
});

describe("fingerprint", () => {
  const named = { name: "王小东.dcm", file: file("王小东.dcm", [1]) };

  it("is the same for the same file and does not hold its name", async () => {
    expect(await fingerprint("7", named, "")).toMatch(/^[0-9a-f]{64}$/);
    expect(await fingerprint("7", named, "")).toBe(await fingerprint("7", { ...named }, ""));
  });

  it("differs by person, name and form", async () => {
    const prints = await Promise.all([
      fingerprint("7", named, ""), fingerprint("8", named, ""), fingerprint("7", { ...named, name: "b" }, ""), fingerprint("7", named, "{}"),
    ]);
    expect(new Set(prints).size).toBe(4);
  });
});
