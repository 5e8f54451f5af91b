"use strict";
// The server writes every time in UTC. This script shows it in the time zone of the browser, and names that zone.
(() => {
  const two = (number) => String(number).padStart(2, "0");
  const local = (iso, isShort) => {
    const at = new Date(iso);
    if (Number.isNaN(at.getTime())) return null;
    const text = `${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
    return isShort ? text : `${at.getFullYear()}-${text}`;
  };
  const show = (element, iso, isShort) => {
    const text = local(iso, isShort);
    if (text !== null) element.textContent = text;
  };
  for (const element of document.querySelectorAll("time[datetime]:not([title])")) show(element, element.dateTime, false);
  for (const element of document.querySelectorAll("[data-time]")) show(element, element.dataset.time, true);
  for (const element of document.querySelectorAll("time[datetime][title]")) element.title = local(element.dateTime, false) ?? element.title;
  for (const element of document.querySelectorAll("[data-zone]")) {
    const minutes = -new Date(element.dataset.zone).getTimezoneOffset();
    const offset = `UTC${minutes < 0 ? "-" : "+"}${two(Math.floor(Math.abs(minutes) / 60))}:${two(Math.abs(minutes) % 60)}`;
    const name = new Intl.DateTimeFormat().resolvedOptions().timeZone;
    element.textContent = name && name !== "UTC" ? `${name}, ${offset}` : offset;
  }
})();
