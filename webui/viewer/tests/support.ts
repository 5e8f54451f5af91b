/** What several tests of the page scripts need: a server that is a function, visibility, and listeners that end with the test. */
import { afterEach, beforeEach, vi, type Mock } from "vitest";

export type Answer = () => Response | Promise<Response>;

/** Stands in for the box: `answers` is asked once per request, by the path of the address. */
export function serve(answers: Record<string, Answer>): Mock<typeof fetch> {
  const fetching = vi.fn<typeof fetch>(async (input) => {
    const path = String(input).split("?")[0] ?? "";
    const answer = answers[path];
    if (!answer) {
      throw new TypeError(`no answer for ${path}`);
    }
    return answer();
  });
  vi.stubGlobal("fetch", fetching);
  return fetching;
}

/** How often an address was asked for. */
export function requestsOf(fetching: Mock<typeof fetch>, path: string): RequestInit[] {
  return fetching.mock.calls.filter(([input]) => String(input).startsWith(path)).map(([, options]) => options ?? {});
}

export function header(options: RequestInit | undefined, name: string): string | null {
  return new Headers(options?.headers).get(name);
}

/** The answer of `/api/v1/revision` when something is new. */
export function revision(number: number): Response {
  return new Response(JSON.stringify({ revision: number }), {
    headers: { "Content-Type": "application/json", ETag: `"${number}"` },
  });
}

export function unchanged(): Response {
  return new Response(null, { status: 304 });
}

export function page(html: string): Response {
  return new Response(html, { headers: { "Content-Type": "text/html" } });
}

let visibility: DocumentVisibilityState = "visible";

/** Hides the page or brings it to the front. */
export function setVisibility(state: DocumentVisibilityState): void {
  visibility = state;
  document.dispatchEvent(new Event("visibilitychange"));
}

/** Fake time, a visible page, an empty body; what a test registers on the document and the window ends with it. */
export function useFreshPage(): void {
  const registered: [EventTarget, string, EventListenerOrEventListenerObject][] = [];
  beforeEach(() => {
    vi.useFakeTimers();
    visibility = "visible";
    Object.defineProperty(document, "visibilityState", { configurable: true, get: () => visibility });
    document.body.innerHTML = "";
    for (const target of [document, window] as EventTarget[]) {
      const add = target.addEventListener.bind(target);
      vi.spyOn(target, "addEventListener").mockImplementation((type: string, listener: unknown) => {
        registered.push([target, type, listener as EventListener]);
        add(type, listener as EventListener);
      });
    }
  });
  afterEach(() => {
    for (const [target, type, listener] of registered.splice(0)) {
      target.removeEventListener(type, listener);
    }
    vi.clearAllTimers();
    vi.useRealTimers();
  });
}
