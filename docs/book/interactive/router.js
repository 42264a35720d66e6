const {E, G, M, K, N, pool} = DATA;
let bias, load, at, past, timer = null;

// The k largest, largest first; of equals the lower index, as the specification has it.
const topK = (x, k) => [...x.keys()].sort((i, j) => x[j] - x[i] || i - j).slice(0, k);

function route(s, grouped) {
  const counts = new Array(E).fill(0), size = E / G;
  for (const token of s) {
    let a = token.map((x, i) => x + bias[i]);
    if (grouped) {
      const worth = [...Array(G).keys()].map((g) => {
        const best = a.slice(g * size, (g + 1) * size).sort((x, y) => y - x);
        return best[0] + best[1];
      });
      const kept = new Set(topK(worth, M));
      a = a.map((x, i) => (kept.has(Math.floor(i / size)) ? x : -Infinity));
    }
    for (const i of topK(a, K)) counts[i] += 1;
  }
  return counts;
}

function step() {
  if (load) {
    const gamma = Number($("gamma").value), mean = N * K / E;
    bias = bias.map((b, i) => b + gamma * Math.sign(mean - load[i]));
  }
  load = route(pool[at % pool.length], $("grouped").checked);
  at += 1;
  past.push(Math.max(...load) / (N * K / E));
}

function show() {
  const mean = N * K / E, most = Math.max(...load), busy = load.indexOf(most);
  for (let i = 0; i < E; i++) {
    const h = 80 * load[i] / N, y = 100 - h;
    $("load" + i).setAttribute("y", y); $("load" + i).setAttribute("height", h);
    $("loadsays" + i).setAttribute("y", y - 4); $("loadsays" + i).textContent = load[i];
    const d = Math.max(-55, Math.min(55, bias[i] / 10));
    $("bias" + i).setAttribute("y", 190 - Math.max(d, 0)); $("bias" + i).setAttribute("height", Math.abs(d));
    $("biassays" + i).setAttribute("y", d < 0 ? 190 - d + 12 : 186 - d);
    $("biassays" + i).textContent = bias[i] ? (bias[i] / 1000).toFixed(2) : "0";
  }
  $("mean").setAttribute("d", `M5 ${100 - 80 * mean / N}H585`);
  const shown = past.slice(-139);
  $("past").setAttribute("points", shown.map((r, i) => `${32 + 4 * i},${115 - 50 * (r - 1)}`).join(" "));
  $("gammasays").textContent = (Number($("gamma").value) / 1000).toFixed(3);
  $("says").textContent = `Batch ${at}: expert ${busy} is busiest with ${most} tokens, ${(most / mean).toFixed(2)} times the mean of ${mean}.`;
  document.body.dataset.load = load.join(" "); document.body.dataset.bias = bias.join(" ");
}

function reset() { bias = new Array(E).fill(0); load = null; at = 0; past = []; step(); show(); }
function pause() { clearInterval(timer); timer = null; $("run").textContent = "Run"; $("run").setAttribute("aria-pressed", "false"); }
$("step").onclick = () => { step(); show(); };
$("ten").onclick = () => { for (let i = 0; i < 10; i++) step(); show(); };
$("reset").onclick = () => { pause(); reset(); };
$("gamma").oninput = show;
$("grouped").onchange = () => { pause(); reset(); };
$("run").onclick = () => {
  if (timer !== null) { pause(); return; }
  timer = setInterval(() => { step(); show(); }, 150);
  $("run").textContent = "Pause"; $("run").setAttribute("aria-pressed", "true");
};
$("live").hidden = false; $("still").hidden = true;
reset();
