// What llama.cpp answers in the golden sessions, through node-llama-cpp, which brings it prebuilt.
//
//   npm i node-llama-cpp @node-llama-cpp/linux-x64 --ignore-scripts
//   minilora golden GOLDEN
//   node sessions_llama_cpp.mjs GOLDEN RESULTS
//   minilora golden GOLDEN --compare RESULTS
//
// A model lives on through a session, and loads each adapter once, by the name of its file: NAME.gguf, which is written
// anew where a name stands for another folder. node-llama-cpp gives adapters to a context, so each request has a context
// of its own, and each prompt of a mixed batch. It merges nothing.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { getLlama } from "node-llama-cpp";

const [golden, results] = process.argv.slice(2);
const index = JSON.parse(readFileSync(join(golden, "index.json"), "utf8"));
mkdirSync(results, { recursive: true });

// llama.cpp keeps keys and values in float16 here.
function writeAnswers(file, numbers, shape) {
  const entry = { dtype: "F32", shape, data_offsets: [0, 4 * numbers.length] };
  const header = JSON.stringify({ __metadata__: { computed_in: "float16" }, log_probabilities: entry });
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(Buffer.byteLength(header)));
  writeFileSync(file, Buffer.concat([start, Buffer.from(header), Buffer.from(new Float32Array(numbers).buffer)]));
}

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
for (const session of index.sessions) {
  if (session.requests.some((request) => request.merged)) {
    console.log(`${session.id}: llama.cpp merges nothing`);
    continue;
  }
  const exported = mkdtempSync(join(tmpdir(), "golden-"));
  const model = await llama.loadModel({ modelPath: join(golden, index.bases[session.base].gguf), gpuLayers: 0 });
  const folders = {};
  for (const [n, request] of session.requests.entries()) {
    for (const name of request.unload ?? []) {
      rmSync(join(exported, `${name}.gguf`));
      delete folders[name];
    }
    const found = [];
    for (const [j, prompt] of request.prompts.entries()) {
      const use = request.adapters[j], adapters = [];
      if (use) {
        const filePath = join(exported, `${use.name}.gguf`);
        if (folders[use.name] !== use.folder) {
          if (existsSync(filePath)) rmSync(filePath);
          execFileSync("minilora", ["export", join(golden, use.folder), "--model", join(golden, session.base), "-o", filePath]);
          folders[use.name] = use.folder;
        }
        adapters.push({ filePath, scale: use.weight });
      }
      const context = await model.createContext({ contextSize: 512, sequences: 1, threads: 1, lora: { adapters } });
      const asked = await context.getSequence().controlledEvaluate(
        prompt.map((id, i) => (i + 1 < prompt.length ? id : [id, { generateNext: { probabilities: true } }])),
      );
      const byToken = asked[prompt.length - 1].next.probabilities;
      for (let id = 0; id < byToken.size; id++) found.push(Math.log(byToken.get(id)));
      await context.dispose();
    }
    const P = request.prompts.length;
    writeAnswers(join(results, `${session.id}.${n}.safetensors`), found, [P, found.length / P]);
  }
  await model.dispose();
}
process.exit(0);
