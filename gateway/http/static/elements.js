// Makes elements. Text only ever goes in as text, so nothing that a model or a file's name says can become markup.

export function element(name, attributes = {}, children = []) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function text(name, attributes, words) {
  return element(name, attributes, [document.createTextNode(words)]);
}
