/** The files that a person chose or dropped: one, many, or folders with everything in them. */

/** A file and its name with the folders in front of it. */
export interface Named {
  file: File;
  name: string;
}

const PNG = [0x89, 0x50, 0x4e, 0x47];
const JPEG = [0xff, 0xd8, 0xff];

/** The files of an input element; those of a folder carry their path. */
export function chosenFiles(list: FileList): Named[] {
  return [...list].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
}

/**
 * The files that were dropped, with those of all subfolders. The entries must be requested before anything is awaited:
 * the browser empties the list when the event is over.
 */
export async function droppedFiles(data: DataTransfer): Promise<Named[]> {
  const entries = [...data.items].flatMap((item) => {
    const entry = item.kind === "file" ? item.webkitGetAsEntry() : null;
    return entry ? [entry] : [];
  });
  if (entries.length === 0) {
    return chosenFiles(data.files);
  }
  const files: Named[] = [];
  for (const entry of entries) {
    await walk(entry, files);
  }
  return files;
}

async function walk(entry: FileSystemEntry, files: Named[]): Promise<void> {
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    files.push({ file, name: entry.fullPath.replace(/^\//, "") });
    return;
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  for (;;) {
    // A browser gives the entries of a folder in portions of a hundred, and an empty one at the end.
    const portion = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (portion.length === 0) {
      return;
    }
    for (const inner of portion) {
      await walk(inner, files);
    }
  }
}

/** True for PNG and JPEG, by their first bytes as on the box: a name can be wrong. */
export async function isPicture(file: File): Promise<boolean> {
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  return [PNG, JPEG].some((magic) => magic.every((byte, place) => head[place] === byte));
}

/** Identifies an upload after a reload: a digest, since it stays in the browser and a file's name may be that of a patient. */
export async function fingerprint(user: string, named: Named, form: string): Promise<string> {
  const { file, name } = named;
  const text = JSON.stringify([user, name, file.size, file.lastModified, form]);
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
