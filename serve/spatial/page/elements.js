// Short ways to the elements of the page, and its box for problems.

export const $ = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en");

export function size(bytes) {
  if (bytes < 1e6) return `${number.format(Math.ceil(bytes / 1e3))} kB`;
  return `${number.format(Math.round(bytes / 1e5) / 10)} MB`;
}

export function problem(title, error) {
  $("problem-title").textContent = title;
  const lines = error.errors?.length
    ? error.errors.map(({ field, message }) => (message.startsWith(field) ? message : `${field}: ${message}`))
    : [error.message];
  $("problem-list").replaceChildren(...lines.map((line) => element("li", line)));
  $("problem").hidden = false;
  if (error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
  $("problem").scrollIntoView({ block: "nearest" });
}

export function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}
