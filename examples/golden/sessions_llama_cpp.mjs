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
  if (session.requests.some((request) => [...request.adapters, ...(request.load ?? [])].some((use) => use?.folder.endsWith("living-head")))) {
    console.log(`${session.id}: an adapter of a tied head has no place in a file for llama.cpp`);
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
    const found = [], load = (use) => {
      const filePath = join(exported, `${use.name}.gguf`);
      if (folders[use.name] !== use.folder) {
        if (existsSync(filePath)) rmSync(filePath);
        execFileSync("minilora", ["export", join(golden, use.folder), "--model", join(golden, session.base), "-o", filePath]);
        folders[use.name] = use.folder;
      }
      return { filePath, scale: use.weight };
    };
    for (const use of request.load ?? []) {
      const context = await model.createContext({ contextSize: 512, sequences: 1, lora: { adapters: [load(use)] } });
      await context.dispose();
    }
    for (const [j, prompt] of request.prompts.entries()) {
      const use = request.adapters[j], adapters = use ? [load(use)] : [];
      const context = await model.createContext({ contextSize: 512, sequences: 1, threads: 1, lora: { adapters } });
      const sequence = context.getSequence();
      let tokens = request.each ? prompt.slice(0, -1) : prompt;
      for (let i = 0; i < (request.generate ?? 1); i++) {
        const asked = await sequence.controlledEvaluate(
          tokens.map((id, i) => (request.each || i + 1 === tokens.length ? [id, { generateNext: { probabilities: true } }] : id)),
        );
        for (const at of asked.filter((one) => one?.next)) {
          const byToken = at.next.probabilities;
          const row = Array.from({ length: byToken.size }, (_, id) => Math.log(byToken.get(id)));
          found.push(...row);
          tokens = [row.indexOf(Math.max(...row))];
        }
      }
      await context.dispose();
    }
    const P = request.prompts.length, V = 128;
    const shape = request.each || request.generate ? [P, found.length / P / V, V] : [P, V];
    writeAnswers(join(results, `${session.id}.${n}.safetensors`), found, shape);
  }
  await model.dispose();
}
process.exit(0);
