/**
 * The list of viewport types that Cornerstone can create, cut down to the one on the study page.
 *
 * Cornerstone's own list names all sixteen classes, so no bundler can leave any of them out. The three functions keep
 * its names and meaning.
 */
import { Enums, StackViewport } from "@cornerstonejs/core";

const { STACK } = Enums.ViewportType;

const viewportTypeToViewportClass: Record<string, typeof StackViewport> = {};
export default viewportTypeToViewportClass;

/** Refuses: the study page has no other viewport. */
export function registerViewportType({ type }: { type: string }): void {
  throw new Error(`viewport type ${type} is not part of this build`);
}

/** Tells whether a viewport of this type can be created. */
export function isRegisteredViewportType(type: string): boolean {
  return type === STACK;
}

/** The class that draws a viewport of this type; throws for any but the stack. */
export function getViewportClassForInput({ type }: { type: string }): typeof StackViewport {
  if (type !== STACK) {
    throw new Error(`viewport type ${type} is not part of this build`);
  }
  return StackViewport;
}
