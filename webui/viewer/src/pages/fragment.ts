/** Fetches the part of a page that changes. */
import { showLoggedOut } from "./connection";

/**
 * Fetches a part of a page, parsed; null when the box cannot be reached or the session has ended.
 *
 * @param fields are sent as a form by POST; without them the request is a GET.
 */
export async function fetchFragment(
  url: string,
  signal: AbortSignal,
  fields?: Readonly<Record<string, string>>,
): Promise<HTMLElement | null> {
  const headers: Record<string, string> = { "X-Fragment": "1", "X-Background": "1" };
  const options: RequestInit = { headers, signal };
  if (fields) {
    headers["X-CSRFToken"] = document.querySelector<HTMLMetaElement>("meta[name=csrf-token]")?.content ?? "";
    options.method = "POST";
    options.body = new URLSearchParams(fields);
  }
  try {
    const response = await fetch(url, options);
    if (response.status === 401) {
      showLoggedOut();
    }
    return response.ok ? new DOMParser().parseFromString(await response.text(), "text/html").body : null;
  } catch {
    return null;
  }
}
