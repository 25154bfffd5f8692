// Excerpts of the search have each formula once, and nothing of the links below a title.
const plain = Search.htmlToText;
Search.htmlToText = (html, anchor) => {
  const page = new DOMParser().parseFromString(html, "text/html");
  page.querySelectorAll(".katex-html, annotation, .ways").forEach((element) => element.remove());
  return plain(page.documentElement.outerHTML, anchor);
};
