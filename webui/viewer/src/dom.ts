/** Small helpers to build the page's elements without markup strings, which a strict CSP and hostile text both forbid. */

type Attributes = Readonly<Record<string, string | number | boolean | undefined>>;

function setAll(node: Element, attributes: Attributes): void {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== undefined && value !== false) {
      node.setAttribute(name, String(value));
    }
  }
}

/** An HTML element with attributes and children. */
export function html<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[Name] {
  const node = document.createElement(name);
  setAll(node, attributes);
  node.append(...children);
  return node;
}

/** An SVG element with attributes and children. */
export function svg<Name extends keyof SVGElementTagNameMap>(
  name: Name,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): SVGElementTagNameMap[Name] {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  setAll(node, attributes);
  node.append(...children);
  return node;
}

/** Sets the text of a node only when it changed, so that the browser does not lay the page out again. */
export function setText(node: Element, text: string): void {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

/** The first element that fits the selector. Throws `Error` if there is none: then the page's template and its script do not fit. */
export function find<Kind extends HTMLElement>(root: ParentNode, selector: string): Kind {
  const node = root.querySelector<Kind>(selector);
  if (!node) {
    throw new Error(`no element ${selector} on this page`);
  }
  return node;
}
