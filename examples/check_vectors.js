// The frozen vectors without Python: node examples/check_vectors.js [corpus folder]
// Checks every hash and count of rope.rotate_interleaved, runs `rotate` in double precision, compares with the bounds.
const { createHash } = require("crypto");
const fs = require("fs");
const path = require("path");

const OPERATOR = "rope.rotate_interleaved";
const folder = process.argv[2] || path.join(__dirname, "..", "conformance", "vectors");

function rotate({ x, positions }, { base }) {
  const [b, n, h, d] = x.shape;
  const out = new Float64Array(x.data.length);
  for (let i = 0; i < out.length; i += 2) {
    const pair = (i % d) / 2, token = Math.floor(i / (h * d)) % n, row = Math.floor(i / (n * h * d));
    const position = positions.data[positions.shape.length > 1 ? row * n + token : token];
    const angle = Number(position) * Math.pow(base, (-2 * pair) / d);
    out[i] = x.data[i] * Math.cos(angle) - x.data[i + 1] * Math.sin(angle);
    out[i + 1] = x.data[i] * Math.sin(angle) + x.data[i + 1] * Math.cos(angle);
  }
  return out;
}

const TYPES = { F64: [Float64Array, 8], F32: [Float32Array, 4], I64: [BigInt64Array, 8], BOOL: [Uint8Array, 1] };

function safetensors(bytes) {
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString("utf8"));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [type, width] = TYPES[dtype];
    const copy = Uint8Array.from(bytes.subarray(8 + size + from, 8 + size + to));
    tensors[name] = { shape, data: new type(copy.buffer, 0, (to - from) / width) };
  }
  return tensors;
}

const manifest = JSON.parse(fs.readFileSync(path.join(folder, "manifest.json"), "utf8"));
let ran = 0, failed = 0;
for (const entry of manifest.cases.filter((c) => c.operator === OPERATOR)) {
  const bytes = fs.readFileSync(path.join(folder, entry.file));
  if (createHash("sha256").update(bytes).digest("hex") !== entry.sha256) throw new Error(`${entry.file}: wrong SHA-256`);
  const tensors = safetensors(bytes);
  const input = Object.fromEntries(
    Object.entries(tensors).filter(([k]) => k.startsWith("input/")).map(([k, v]) => [k.slice(6), v]));
  const out = rotate(input, entry.attributes);
  const expected = tensors["expected/y"].data, bound = tensors["bound/y/float64-strict"].data;
  const bad = expected.findIndex((e, i) => !(Math.abs(out[i] - e) <= bound[i]));
  ran += 1;
  failed += bad >= 0;
  console.log(`${bad < 0 ? "pass" : "FAIL"} ${entry.id}${bad < 0 ? "" : `: element ${bad} is ${out[bad]}, expected ${expected[bad]}`}`);
}
if (ran < manifest.operators[OPERATOR].minimum) throw new Error(`${ran} cases ran, the manifest promises more`);
console.log(`${ran - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
