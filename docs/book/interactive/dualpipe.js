const D = DATA;
let name = "dualpipe", t = 0, timer = null, begun = false;
const quiet = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const from = op => " (from rank " + (op[1] ? D.ranks - 1 : 0) + ")";
const word = (op, two) => D.kinds[op[0]] + " of " + op[2] + (two ? from(op) : "");
function at(rank) { return D.schedules[name].rows[rank].findIndex(s => s[0] <= t && t < s[1]); }
function say(rank) {
  const i = at(rank);
  if (i < 0) return "idle";
  const s = D.schedules[name].rows[rank][i], two = name === "dualpipe";
  return s[2].map(op => word(op, two)).join(" together with ") + (s[3] ? "; step " + s[3] : "");
}
function show() {
  const S = D.schedules[name], svg = $("pic-" + name), follow = two() ? $("follow").value : $("follow").value && any();
  $("time").max = S.end; $("time").value = t; $("clock").value = t + " of " + S.end;
  $("time").setAttribute("aria-valuetext", "time " + t + " of " + S.end);
  svg.classList.toggle("play", (begun && t < S.end) || !!follow);
  svg.querySelectorAll(".rank").forEach((row, r) => row.querySelectorAll(".box").forEach((box, i) => {
    const s = S.rows[r][i];
    box.classList.toggle("on", s[0] <= t && t < s[1]);
    box.classList.toggle("past", s[1] <= t);
    const mine = !!follow && s[2].some(op => op[1] + "." + op[2] === follow);
    box.classList.toggle("mine", mine);
    box.classList.toggle("other", !!follow && !mine);
  }));
  const x = D.left + t * D.unit, now = svg.querySelector(".now"), pane = $("scroll");
  now.setAttribute("x1", x); now.setAttribute("x2", x); now.setAttribute("visibility", "visible");
  const ahead = x - pane.scrollLeft;
  if (ahead < D.left || ahead > pane.clientWidth - 3 * D.unit) pane.scrollLeft = x - pane.clientWidth / 2;
  let busy = 0; const steps = new Set();
  for (let r = 0; r < D.ranks; r++) {
    const line = $("said").children[r], text = say(r), i = at(r);
    if (i >= 0) { busy++; if (S.rows[r][i][3]) steps.add(S.rows[r][i][3]); }
    line.textContent = "rank " + r + ": " + text; line.className = i < 0 ? "idle" : "";
  }
  const list = [...steps].sort().map(k => "step " + k + ", " + D.steps[k]);
  const over = S.name + " is over after " + S.end + " time units; a rank was idle for " + Math.min(...S.idle) + " of them.";
  const words = "Time " + t + ": " + busy + " of " + D.ranks + " ranks compute.";
  $("about").textContent = t >= S.end ? over : words + (list.length ? " In " + list.join("; in ") + "." : "");
}
function two() { return name === "dualpipe"; }
function any() { const [d, c] = $("follow").value.split(".").map(Number); return "0." + (c + d * D.half); }
function go(to) { begun = true; t = Math.max(0, Math.min(D.schedules[name].end, to));
  if (t >= D.schedules[name].end) stop(); show(); }
function label(text, pressed) { $("play").textContent = text; $("play").setAttribute("aria-pressed", pressed); }
function stop() { if (timer) clearInterval(timer); timer = null; label("Play", "false");
  $("about").setAttribute("aria-live", "polite"); }
function play() {
  if (timer) return stop();
  if (t >= D.schedules[name].end) t = 0;
  begun = true; $("about").setAttribute("aria-live", "off");
  timer = setInterval(() => go(t + 1), quiet ? 1200 : 500); label("Pause", "true"); show();
}
function pick() {
  name = $("which").value; stop(); t = 0; begun = false;
  for (const f of document.querySelectorAll("figure")) f.hidden = f.dataset.name !== name;
  show();
}
for (let r = 0; r < D.ranks; r++) $("said").append(document.createElement("li"));
document.querySelector(".controls").hidden = $("said").hidden = false;
$("still").hidden = true;
$("first").onclick = () => go(0); $("last").onclick = () => go(1e9); $("back").onclick = () => go(t - 1);
$("next").onclick = () => go(t + 1);
$("play").onclick = play; $("time").oninput = e => go(+e.target.value); $("which").onchange = pick; $("follow").onchange = show;
document.addEventListener("keydown", e => {
  if (["SELECT", "INPUT"].includes(e.target.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
  const keys = { ArrowRight: () => go(t + 1), ArrowLeft: () => go(t - 1), Home: () => go(0), End: () => go(1e9) };
  if (e.key === " " && e.target.tagName !== "BUTTON") keys[" "] = play;
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
pick();
