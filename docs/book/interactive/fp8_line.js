let code = 0, x = 0.3;
const format = () => DATA[$("format").value];
const bits = [...document.querySelectorAll("[data-bit]")];

// Nearest value, of two equally near the one whose code is even; what is too large becomes the largest (as the GPU's conversion does).
function encode(x) {
  const {values} = format(), size = Math.abs(x);
  let best = 0;
  for (let c = 1; c < 128; c++) {
    if (values[c] === null) continue;
    const d = Math.abs(values[c] - size) - Math.abs(values[best] - size);
    if (d < 0 || (d === 0 && c % 2 === 0)) best = c;
  }
  return best + (x < 0 || Object.is(x, -0) ? 128 : 0);
}

const short = (v) => (v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(4) : String(Number(v.toPrecision(7))));

function show() {
  const {values, m, bias} = format(), v = values[code], size = code & 127;
  for (const b of bits) {
    const on = (code >> Number(b.dataset.bit)) & 1, bit = Number(b.dataset.bit);
    b.textContent = on; b.setAttribute("aria-pressed", String(Boolean(on)));
    b.setAttribute("aria-label", `${bit === 7 ? "sign" : bit >= m ? "exponent" : "fraction"} bit ${bit}: ${on}`);
    b.style.marginLeft = bit === 6 || bit === m - 1 ? ".8rem" : "0";
  }
  const field = size >> m, fraction = size & ((1 << m) - 1), sign = code & 128 ? "-" : "";
  const says = v === null ? "no number (infinity or NaN)" : field ? `${sign}(1 + ${fraction}/${1 << m}) * 2^(${field} - ${bias}) = ${short(v)}`
    : `${sign}${fraction}/${1 << m} * 2^${1 - bias} = ${short(v)}  (subnormal)`;
  $("fields").textContent = `0x${code.toString(16).padStart(2, "0")}: ${says}`;
  const off = v === null || x === 0 ? null : Math.abs(v - x) / Math.abs(x);
  $("says").textContent = v === null ? `Code 0x${code.toString(16)} is ${says}.`
    : `${short(x)} is rounded to ${short(v)}` + (off ? `, off by ${(100 * off).toFixed(2)} %.` : ", exactly.");
  const [left, right, low, high] = DATA.axis, shown = Math.abs(x), at = left + (right - left) * (Math.log2(shown) - low) / (high - low);
  const inside = shown > 0 && at >= left - 10 && at <= right + 10, y = $("format").value === "e4m3" ? 14 : 60;
  $("here").setAttribute("d", inside ? `M${at.toFixed(2)} ${y}v30` : "");
  near(values, size);
  document.body.dataset.code = code; document.body.dataset.value = v === null ? "none" : v;
}

function near(values, size) {
  const around = [];
  for (let c = Math.max(0, size - 3); c <= Math.min(127, size + 3); c++) if (values[c] !== null) around.push([c, values[c]]);
  if (around.length < 2) { $("near").innerHTML = ""; return; }
  const first = around[0][1], last = around[around.length - 1][1], to = (v) => 40 + 520 * (v - first) / (last - first);
  let out = '<path class="line" d="M40 30H560"/>';
  for (const [c, v] of around) {
    out += `<path class="line" stroke-width="${c === size ? 4 : 1.5}" d="M${to(v).toFixed(1)} 22v16"/>` +
      `<text x="${to(v).toFixed(1)}" y="54" text-anchor="middle">${short(v)}</text>`;
  }
  const shown = Math.abs(x);
  if (shown >= first && shown <= last) out += `<path class="warm" d="M${to(shown).toFixed(1)} 20l-5 -10h10z"/>`;
  $("near").innerHTML = out;
}

function take(value) { x = value; code = encode(x); show(); }
$("x").oninput = () => { const v = Number($("x").value); if ($("x").value.trim() !== "" && Number.isFinite(v)) take(v); };
$("move").oninput = () => { const v = 2 ** (Number($("move").value) / 100); $("x").value = short(v); take(v); };
$("format").onchange = () => take(x);
for (const b of bits) b.onclick = () => {
  code ^= 1 << Number(b.dataset.bit);
  const v = format().values[code];
  if (v !== null) { x = v; $("x").value = Object.is(v, -0) ? "-0" : short(v); }
  show();
};
$("live").hidden = false; $("still").hidden = true;
take(0.3);
