// Sphinx's own weights; but the page of a stage whose name was asked for comes first.
var Scorer = {
  score: ([docname, , anchor, , score]) => {
    const asked = (new URLSearchParams(window.location.search).get("q") || "").trim().toLowerCase();
    return docname === `stages/${asked}` && !anchor ? score + 100 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
