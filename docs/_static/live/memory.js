// minilora/language/memory.py in JavaScript, for decoders without experts: the bytes that training keeps, by what for.

const CONSTANTS = { 16: 0, 8: 32 / 4096, 4: 8 / 64 + 32 / (64 * 256) }; // bits a weight for the constants of its block

// A model's sizes: V words, d wide, m inside the MLP, L layers, H heads of queries and K of keys, each D wide; whether
// the head is the embedding (tied), whether q, k and v have biases, and whether q and k are normed. Each from its
// config.json.
export const MODELS = {
  "SmolLM2-135M": { V: 49152, d: 576, m: 1536, L: 30, H: 9, K: 3, D: 64, tied: true },
  "Qwen2.5-0.5B": { V: 151936, d: 896, m: 4864, L: 24, H: 14, K: 2, D: 64, tied: true, biases: true },
  "Llama-3.2-1B": { V: 128256, d: 2048, m: 8192, L: 16, H: 32, K: 8, D: 64, tied: true },
  "Llama-3.2-3B": { V: 128256, d: 3072, m: 8192, L: 28, H: 24, K: 8, D: 128, tied: true },
  "Llama-2-7B": { V: 32000, d: 4096, m: 11008, L: 32, H: 32, K: 32, D: 128 },
  "Mistral-7B": { V: 32000, d: 4096, m: 14336, L: 32, H: 32, K: 8, D: 128 },
  "Qwen2.5-7B": { V: 152064, d: 3584, m: 18944, L: 28, H: 28, K: 4, D: 128, biases: true },
  "Llama-3.1-8B": { V: 128256, d: 4096, m: 14336, L: 32, H: 32, K: 8, D: 128 },
  "Llama-2-13B": { V: 32000, d: 5120, m: 13824, L: 40, H: 40, K: 40, D: 128 },
  "Qwen2.5-14B": { V: 152064, d: 5120, m: 13824, L: 48, H: 40, K: 8, D: 128, biases: true },
  "Qwen2.5-32B": { V: 152064, d: 5120, m: 27648, L: 64, H: 40, K: 8, D: 128, biases: true },
  "Llama-3.1-70B": { V: 128256, d: 8192, m: 28672, L: 80, H: 64, K: 8, D: 128 },
};

// The shapes (out, in) of one layer's seven matrices.
function matrices({ d, m, H, K, D }) {
  return [[H * D, d], [K * D, d], [K * D, d], [d, H * D], [m, d], [m, d], [d, m]];
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// How many numbers the matrices of all layers have, and how many all else has.
export function countNumbers(model) {
  const { V, d, L, H, K, D, tied, biases, normed } = model;
  const around = L * (2 * d + (biases ? (H + 2 * K) * D : 0) + (normed ? 2 * D : 0)) + d + V * d * (tied ? 1 : 2);
  return [L * sum(matrices(model).map(([out, n_in]) => out * n_in)), around];
}

// How many numbers adapters of this rank have, beside all seven matrices of each layer.
export function adapterNumbers(model, rank) {
  return model.L * rank * sum(matrices(model).map(([out, n_in]) => out + n_in));
}

// As Python rounds.
function halfToEven(x) {
  const low = Math.floor(x);
  return x - low < 0.5 || (x - low === 0.5 && low % 2 === 0) ? low : low + 1;
}

// The bytes that a step keeps. Without `rank` all weights train; `recompute` keeps each layer's input alone.
export function trainingMemory(model, { tokens, rank = null, bits = 16, recompute = false }) {
  const { V, d, m, L, H, K, D, normed } = model, [inside, elsewhere] = countNumbers(model);
  const trained = rank === null ? inside + elsewhere : adapterNumbers(model, rank);
  const attention = (normed ? 3 : 2) * D * (H + K); // q k v y, and q and k before their norms
  const layer = 4 * d + attention + 3 * m + 7 * (rank ?? 0); // two norms in and out, attention, gate up product
  const activations = recompute ? (L - 1) * d + layer : L * layer;
  return {
    weights: halfToEven((inside * (bits + CONSTANTS[bits])) / 8 + 2 * elsewhere),
    trained: 4 * trained,
    gradients: (rank === null ? 2 : 4) * trained,
    Adam: 8 * trained,
    activations: 2 * tokens * activations,
    logits: 4 * tokens * V,
  };
}

// The bytes of all parts together.
export const total = (parts) => sum(Object.values(parts));
