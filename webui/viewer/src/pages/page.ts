/** What every page does: send the time zone of the browser to the box, and close the user menu as people expect it. */
import "../styles/page.css";

/** Keeps the time zone in a cookie, so that the box writes times as the clock on the wall shows them. */
export function storeTimeZone(): void {
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone && !document.cookie.includes(`tz=${zone}`)) {
    const secure = location.protocol === "https:" ? "; secure" : "";
    document.cookie = `tz=${zone}; path=/; max-age=31536000; samesite=lax${secure}`;
  }
}

/** Closes the menu at a click outside of it and at Escape. */
export function closeMenuOnLeave(menu: HTMLDetailsElement): void {
  document.addEventListener("click", (event) => {
    if (!menu.contains(event.target as Node)) {
      menu.open = false;
    }
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && menu.open) {
      menu.open = false;
      menu.querySelector("summary")?.focus();
    }
  });
}

storeTimeZone();
const menu = document.querySelector<HTMLDetailsElement>("details.user");
if (menu) {
  closeMenuOnLeave(menu);
}
