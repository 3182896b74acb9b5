// Drawn in grey on white, whichever colours the page has, and in their own size: see site.css.
const size = { useMaxWidth: false };
mermaid.initialize({
  startOnLoad: true,
  theme: "neutral",
  themeVariables: { noteBkgColor: "#eee", noteTextColor: "#333", noteBorderColor: "#999" },
  fontFamily: "sans-serif", // what it measures must be what is drawn
  flowchart: size,
  sequence: size,
  state: size,
});
