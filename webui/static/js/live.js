// Following what changes on the box: server-sent events, and asking at intervals where no stream is to be had.
// Only the page in front holds a stream: a browser opens at most six connections to one host, and old PCs have many tabs.

const POLL_MS = 4000;
const STREAM_AGAIN_MS = 60000;
const LOST_AFTER_MS = 6000;

/**
 * @typedef {{id: number, state: string, position: number | null, urgent: boolean}} Study
 *
 * Calls `changed` with what the box says of each change after revision `since`.
 * @param {number} since
 * @param {(change: {revision: number, studies: Study[] | null}) => void} changed
 */
export function follow(since, changed) {
  const line = document.getElementById("live");
  let stream = null;
  let poll = 0;
  let lostTimer = 0;

  function say(state) {
    clearTimeout(lostTimer);
    lostTimer = 0;
    if (line) {
      line.textContent = line.dataset[state] ?? "";
      line.classList.toggle("is-lost", state === "lost");
    }
  }

  function soonLost() {
    lostTimer ||= setTimeout(() => say("lost"), LOST_AFTER_MS);
  }

  function open() {
    stop();
    stream = new EventSource(`/api/v1/events?since=${since}`);
    stream.addEventListener("open", () => say("live"));
    stream.addEventListener("studies", (event) => {
      since = Number(event.lastEventId);
      changed(JSON.parse(event.data));
    });
    stream.addEventListener("error", () => {
      if (stream && stream.readyState === EventSource.CLOSED) {
        ask();
        setTimeout(() => stream || document.hidden || open(), STREAM_AGAIN_MS);
      } else {
        soonLost();
      }
    });
  }

  async function ask() {
    stop();
    poll = setTimeout(ask, POLL_MS);
    try {
      const answer = await fetch("/api/v1/revision", { headers: { "X-Background": "1" } });
      if (answer.status === 401) {
        loggedOut();
        stop();
        return;
      }
      if (!answer.ok) {
        soonLost();
        return;
      }
      const { revision } = await answer.json();
      say("polling");
      if (revision > since) {
        since = revision;
        changed({ revision, studies: null });
      }
    } catch {
      soonLost();
    }
  }

  function stop() {
    stream?.close();
    stream = null;
    clearTimeout(poll);
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : open()));
  window.addEventListener("pagehide", stop);
  if (!document.hidden) {
    open();
  }
}

/** Fetches a piece of a page again; null when the box cannot be reached or the session ended. */
export async function fragment(url, fields) {
  const headers = { "X-Fragment": "1", "X-Background": "1" };
  const options = { headers };
  if (fields) {
    headers["X-CSRFToken"] = document.querySelector("meta[name=csrf-token]").content;
    options.method = "POST";
    options.body = new URLSearchParams(fields);
  }
  try {
    const answer = await fetch(url, options);
    if (answer.status === 401) {
      loggedOut();
    }
    return answer.ok ? new DOMParser().parseFromString(await answer.text(), "text/html").body : null;
  } catch {
    return null;
  }
}

/** Says that the session has ended, once and for good. */
export function loggedOut() {
  document.getElementById("logged-out")?.removeAttribute("hidden");
}

/** Runs `work` soon after the last of many calls, but at least once in `mostMs`; never two at a time. */
export function gently(work, soonMs = 150, mostMs = 1000) {
  let timer = 0;
  let first = 0;
  let running = false;
  let again = false;
  async function run() {
    timer = 0;
    first = 0;
    if (running) {
      again = true;
      return;
    }
    running = true;
    await work();
    running = false;
    if (again) {
      again = false;
      call();
    }
  }
  function call() {
    first ||= Date.now();
    clearTimeout(timer);
    timer = setTimeout(run, Math.min(soonMs, Math.max(0, first + mostMs - Date.now())));
  }
  return call;
}
