// What llama.cpp computes of the golden adapters, and answers in the sessions, through node-llama-cpp, which brings it
// prebuilt.
//
//   npm i node-llama-cpp @node-llama-cpp/linux-x64 --ignore-scripts
//   minilora golden GOLDEN
//   node llama_cpp.mjs GOLDEN RESULTS [--sessions]
//   minilora golden GOLDEN --compare RESULTS
//
// `minilora export` makes each adapter a .gguf file. What such a file cannot hold gets no answers.
//
// SESSIONS. A model lives on through a session, and loads each adapter once, by the name of its file: NAME.gguf, which
// is written anew where a name stands for another folder. node-llama-cpp gives adapters to a context, so each request
// has a context of its own, and each prompt of a mixed batch. It merges nothing.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { getLlama } from "node-llama-cpp";

const [golden, results, how] = process.argv.slice(2);
const index = JSON.parse(readFileSync(join(golden, "index.json"), "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
mkdirSync(results, { recursive: true });

// llama.cpp keeps keys and values in float16 here.
function writeAnswers(file, numbers, shape) {
  const entry = { dtype: "F32", shape, data_offsets: [0, 4 * numbers.length] };
  const header = JSON.stringify({ __metadata__: { computed_in: "float16" }, log_probabilities: entry });
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(Buffer.byteLength(header)));
  writeFileSync(file, Buffer.concat([start, Buffer.from(header), Buffer.from(new Float32Array(numbers).buffer)]));
}

function exportTo(filePath, folder, base) {
  execFileSync("minilora", ["export", join(golden, folder), "--model", join(golden, base), "-o", filePath]);
}

const loadBase = (base) => llama.loadModel({ modelPath: join(golden, index.bases[base].gguf), gpuLayers: 0 });

// The log-probabilities after tokens, those after the last of them or after each.
async function rowsOf(sequence, tokens, each) {
  const asked = await sequence.controlledEvaluate(
    tokens.map((id, i) => (each || i + 1 === tokens.length ? [id, { generateNext: { probabilities: true } }] : id)),
  );
  return asked.filter((one) => one?.next).map(({ next: { probabilities } }) =>
    Array.from({ length: probabilities.size }, (_, id) => Math.log(probabilities.get(id))),
  );
}

async function askCases() {
  const exported = mkdtempSync(join(tmpdir(), "golden-")), models = {};
  for (const one of index.cases) {
    const base = one.base ?? index.base;
    if (!index.bases[base].gguf) continue; // a base in 4 bits
    const given = Array.isArray(one.adapter) ? one.adapter : [[one.adapter, 1]];
    const adapters = given.map(([, scale], i) => ({ filePath: join(exported, `${one.id}-${i}.gguf`), scale }));
    try {
      given.forEach(([folder], i) => exportTo(adapters[i].filePath, folder, base));
    } catch {
      continue; // minilora has said why
    }
    models[base] ??= await loadBase(base);
    const context = await models[base].createContext({ contextSize: 64, sequences: one.prompts.length, threads: 1, lora: { adapters } });
    const found = [];
    for (const prompt of one.prompts) found.push(...(await rowsOf(context.getSequence(), prompt, true)));
    const [prompts, length] = [one.prompts.length, one.prompts[0].length];
    writeAnswers(join(results, `${one.id}.safetensors`), found.flat(), [prompts, length, found[0].length]);
    await context.dispose();
  }
}

async function askSessions() {
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
    const model = await loadBase(session.base), folders = {};
    const load = (use) => {
      const filePath = join(exported, `${use.name}.gguf`);
      if (folders[use.name] !== use.folder) {
        if (existsSync(filePath)) rmSync(filePath);
        exportTo(filePath, use.folder, session.base);
        folders[use.name] = use.folder;
      }
      return { filePath, scale: use.weight };
    };
    for (const [n, request] of session.requests.entries()) {
      for (const name of request.unload ?? []) {
        rmSync(join(exported, `${name}.gguf`));
        delete folders[name];
      }
      for (const use of request.load ?? []) {
        const context = await model.createContext({ contextSize: 512, sequences: 1, lora: { adapters: [load(use)] } });
        await context.dispose();
      }
      const found = [];
      for (const [j, prompt] of request.prompts.entries()) {
        const use = request.adapters[j], adapters = use ? [load(use)] : [];
        const context = await model.createContext({ contextSize: 512, sequences: 1, threads: 1, lora: { adapters } });
        const sequence = context.getSequence();
        let tokens = request.each ? prompt.slice(0, -1) : prompt;
        for (let i = 0; i < (request.generate ?? 1); i++) {
          const rows = await rowsOf(sequence, tokens, request.each);
          found.push(...rows);
          tokens = [rows.at(-1).indexOf(Math.max(...rows.at(-1)))];
        }
        await context.dispose();
      }
      const P = request.prompts.length, V = found[0].length;
      const shape = request.each || request.generate ? [P, found.length / P, V] : [P, V];
      writeAnswers(join(results, `${session.id}.${n}.safetensors`), found.flat(), shape);
    }
    await model.dispose();
  }
}

await (how === "--sessions" ? askSessions() : askCases());
process.exit(0);
