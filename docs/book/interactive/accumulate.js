let at = 0;
const example = () => DATA[$("example").value];
const last = () => example().rows.length + 2;  // align; one for each addend; the sum is written

function show() {
  const e = example(), n = e.rows.length;
  for (const g of document.querySelectorAll("[data-row]")) {
    const j = Number(g.dataset.row);
    const seen = j < n ? at >= j + 1 : j === n ? at >= n + 1 : at >= n + 2;
    g.setAttribute("opacity", seen ? 1 : j < n ? 0.25 : 0);
  }
  let says = `Align: the largest exponent is ${e.E}, so the quantum is 2^${e.quantum} (${e.arch}, F = ${e.E - e.quantum}).`;
  if (at >= 1 && at <= n) {
    const [who, x, , t, lost, running] = e.rows[at - 1];
    says = `${who}: ${x} is ${t} quanta` + (lost ? `, ${lost} is cut` : ", nothing is cut") + `. Sum so far: ${running} quanta.`;
  } else if (at === n + 1) says = `Sum: ${e.S} quanta are ${e.sum[0]}.`;
  else if (at === n + 2) says = `Written: ${e.written[0]}` + (e.lost ? `, ${e.lost} is cut` : ", nothing is cut") + ".";
  $("says").textContent = `${at} of ${last()}. ${says}`;
  $("result").textContent = at === last() ? `Exact sum ${e.exact}, written ${e.written[0]}: off by ${e.written[0] - e.exact}.` : "";
  $("back").disabled = at === 0; $("next").disabled = at === last();
  document.body.dataset.at = at; document.body.dataset.running = at >= 1 ? e.rows[Math.min(at, n) - 1][5] : 0;
}

function begin() { $("picture").innerHTML = example().picture; at = 0; show(); }
$("example").onchange = begin;
$("next").onclick = () => { at = Math.min(at + 1, last()); show(); };
$("back").onclick = () => { at = Math.max(at - 1, 0); show(); };
$("all").onclick = () => { at = last(); show(); };
document.addEventListener("keydown", (k) => {
  if (k.target.tagName === "SELECT") return;
  if (k.key === "ArrowRight") $("next").onclick();
  if (k.key === "ArrowLeft") $("back").onclick();
});
$("live").hidden = false; $("still").hidden = true;
begin();
