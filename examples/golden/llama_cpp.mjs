// What llama.cpp computes of the golden adapters, through node-llama-cpp, which brings it prebuilt.
//
//   npm i node-llama-cpp @node-llama-cpp/linux-x64 --ignore-scripts
//   minilora golden GOLDEN
//   node llama_cpp.mjs GOLDEN RESULTS
//   minilora golden GOLDEN --compare RESULTS
//
// `minilora export` makes each adapter a .gguf file. What such a file cannot hold gets no answers.
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { getLlama } from "node-llama-cpp";

const [golden, results] = process.argv.slice(2);
const index = JSON.parse(readFileSync(join(golden, "index.json"), "utf8"));
const exported = mkdtempSync(join(tmpdir(), "golden-"));
mkdirSync(results, { recursive: true });

// llama.cpp keeps keys and values in float16 here.
function writeAnswers(file, numbers, shape) {
  const entry = { dtype: "F32", shape, data_offsets: [0, 4 * numbers.length] };
  const header = JSON.stringify({ __metadata__: { computed_in: "float16" }, log_probabilities: entry });
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(Buffer.byteLength(header)));
  writeFileSync(file, Buffer.concat([start, Buffer.from(header), Buffer.from(new Float32Array(numbers).buffer)]));
}

function exportAll(one, base) {
  return (Array.isArray(one.adapter) ? one.adapter : [[one.adapter, 1]]).map(([folder, scale], i) => {
    const filePath = join(exported, `${one.id}-${i}.gguf`);
    execFileSync("minilora", ["export", join(golden, folder), "--model", join(golden, base), "-o", filePath]);
    return { filePath, scale };
  });
}

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const models = {};
for (const one of index.cases) {
  const base = one.base ?? index.base;
  if (!index.bases[base].gguf) continue; // a base in 4 bits
  let adapters;
  try {
    adapters = exportAll(one, base);
  } catch {
    continue; // minilora has said why
  }
  models[base] ??= await llama.loadModel({ modelPath: join(golden, index.bases[base].gguf), gpuLayers: 0 });
  const context = await models[base].createContext({ contextSize: 64, sequences: one.prompts.length, threads: 1, lora: { adapters } });
  const found = [];
  for (const prompt of one.prompts) {
    const sequence = context.getSequence();
    const asked = await sequence.controlledEvaluate(prompt.map((id) => [id, { generateNext: { probabilities: true } }]));
    for (const { next } of asked) {
      const byToken = next.probabilities;
      for (let id = 0; id < byToken.size; id++) found.push(Math.log(byToken.get(id)));
    }
  }
  const [prompts, length] = [one.prompts.length, one.prompts[0].length];
  writeAnswers(join(results, `${one.id}.safetensors`), found, [prompts, length, found.length / prompts / length]);
  await context.dispose();
}
process.exit(0);
