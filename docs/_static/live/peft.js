// An adapter as PEFT's two files, and files as one .zip.

import { TARGETS } from "./llama.js";
import { writeSafetensors } from "./safetensors.js";

export function adapterFiles(params, { rank, alpha }) {
  const config = {
    peft_type: "LORA", task_type: "CAUSAL_LM", base_model_name_or_path: null, target_modules: TARGETS,
    r: rank, lora_alpha: alpha, rank_pattern: {}, alpha_pattern: {}, use_rslora: false, use_dora: false,
    fan_in_fan_out: false, bias: "none", lora_dropout: 0, inference_mode: true, init_lora_weights: true,
  };
  const named = Object.entries(params).map(([name, matrix]) => [`base_model.model.${name}.weight`, matrix]);
  return {
    "adapter_config.json": new TextEncoder().encode(`${JSON.stringify(config, null, 2)}\n`),
    "adapter_model.safetensors": writeSafetensors(Object.fromEntries(named)),
  };
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// A .zip of files as they are, not compressed: for each file a header and its bytes, then a directory, then its end.
export function zip(files) {
  const parts = [], directory = [];
  let at = 0;
  const put = (list, fields, ...bytes) => { // fields of [width, value], least significant byte first
    const head = fields.flatMap(([width, value]) => Array.from({ length: width }, (_, i) => (value >>> (8 * i)) & 255));
    list.push(Uint8Array.from(head), ...bytes);
  };
  const size = (list) => list.reduce((sum, bytes) => sum + bytes.length, 0);
  const day = (46 << 9) | (1 << 5) | 1; // a date must stand there: 1 January 2026
  for (const [name, bytes] of Object.entries(files)) {
    const named = new TextEncoder().encode(name);
    const common = [
      [2, 20], [2, 0], [2, 0], [2, 0], [2, day],
      [4, crc32(bytes)], [4, bytes.length], [4, bytes.length], [2, named.length], [2, 0],
    ];
    put(directory, [[4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, at]], named);
    put(parts, [[4, 0x04034b50], ...common], named, bytes);
    at = size(parts);
  }
  const count = Object.keys(files).length, end = [];
  put(end, [[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size(directory)], [4, at], [2, 0]]);
  return new Blob([...parts, ...directory, ...end], { type: "application/zip" });
}
