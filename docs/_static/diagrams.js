// Drawn in grey on white, whichever colours the page has: see site.css.
mermaid.initialize({ startOnLoad: true, theme: "neutral", fontFamily: "inherit" });
