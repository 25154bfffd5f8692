// A Llama decoder with an adapter beside each linear layer: minilora/language/llama.py in JavaScript.
//
// The gradient of a branch's input is dy itself and what the branch passes back. Names of layers are transformers' and
// PEFT's.

import { Attention } from "./attention.js";
import { GatedMLP, RMSNorm } from "./layers.js";
import { Linear, LoRA, LoRALinear } from "./lora.js";
import { Matrix } from "./matrix.js";
import { matrixOf } from "./safetensors.js";

const ADAPTED = { self_attn: ["q_proj", "k_proj", "v_proj", "o_proj"], mlp: ["gate_proj", "up_proj", "down_proj"] };
export const TARGETS = Object.values(ADAPTED).flat();

class Block {
  constructor(parts) {
    Object.assign(this, parts);
  }

  forward(x, T, past) { // (N, d) -> (N, d)
    const [h, norm_1] = this.input_layernorm.forward(x), [attended, self_attn] = this.self_attn.forward(h, T, past);
    const u = x.plus(attended); // eq. (llama.1)
    const [i, norm_2] = this.post_attention_layernorm.forward(u), [gated, mlp] = this.mlp.forward(i);
    const y = u.plus(gated); // eq. (llama.1)
    return [y, { norm_1, self_attn, norm_2, mlp }];
  }

  backward(dy, cache) { // and the gradients of both branches
    const [di, mlp] = this.mlp.backward(dy, cache.mlp);
    const du = dy.plus(this.post_attention_layernorm.backward(di, cache.norm_2)); // eq. (llama.2)
    const [dh, self_attn] = this.self_attn.backward(du, cache.self_attn);
    const dx = du.plus(this.input_layernorm.backward(dh, cache.norm_1)); // eq. (llama.2)
    return [dx, { self_attn, mlp }];
  }
}

export class Llama {
  // `config` is config.json, `tensors` are those of model.safetensors. A starts as PEFT starts it, B at zero.
  constructor(config, tensors, { rank, alpha, random }) {
    const D = config.head_dim, base = config.rope_theta;
    const frequencies = Array.from({ length: D / 2 }, (_, j) => base ** (-2 * j / D)); // eq. (rope.1)
    const norm = (path) => new RMSNorm(tensors[`${path}.weight`].data, config.rms_norm_eps);
    const adapted = (path) => {
      const weight = matrixOf(tensors[`${path}.weight`]), { rows, columns, data } = weight;
      const adapter = LoRA.init(columns, rows, { rank, alpha, random, Numbers: data.constructor });
      return new LoRALinear(new Linear(weight), adapter);
    };
    const all = (path, names) => Object.fromEntries(names.map((name) => [name, adapted(`${path}.${name}`)]));
    this.embedding = matrixOf(tensors["model.embed_tokens.weight"]);
    this.layers = Array.from({ length: config.num_hidden_layers }, (_, i) => {
      const path = `model.layers.${i}`, { gate_proj, up_proj, down_proj } = all(`${path}.mlp`, ADAPTED.mlp);
      return new Block({
        input_layernorm: norm(`${path}.input_layernorm`),
        self_attn: new Attention(all(`${path}.self_attn`, ADAPTED.self_attn), frequencies),
        post_attention_layernorm: norm(`${path}.post_attention_layernorm`),
        mlp: new GatedMLP(gate_proj, up_proj, down_proj),
      });
    });
    this.norm = norm("model.norm");
    this.lm_head = new Linear(this.embedding); // tied: the embedding's own array
  }

  // Token ids of texts of T positions each, one after another. The cache is also the past of what follows one text.
  forward(ids, T, past = null) { // N ids -> (N, V)
    let x = gathered(this.embedding, ids);
    const caches = [];
    for (const [i, block] of this.layers.entries()) {
      const [y, cache] = block.forward(x, T, past?.blocks[i].self_attn);
      x = y;
      caches.push(cache);
    }
    const [h, norm] = this.norm.forward(x);
    return [this.lm_head.forward(h), { blocks: caches, norm }];
  }

  backward(d_logits, { blocks, norm }) { // the gradients of all A and B, by name
    let dx = this.norm.backward(this.lm_head.inputGradient(d_logits), norm);
    const grads = {};
    for (let i = this.layers.length - 1; i >= 0; i -= 1) {
      const [below, found] = this.layers[i].backward(dx, blocks[i]);
      dx = below;
      for (const [branch, layers] of Object.entries(found)) {
        for (const [layer, { lora_A, lora_B }] of Object.entries(layers)) {
          const path = `model.layers.${i}.${branch}.${layer}`;
          Object.assign(grads, { [`${path}.lora_A`]: lora_A, [`${path}.lora_B`]: lora_B });
        }
      }
    }
    return grads;
  }

  trainable() { // all A and B, by name
    const params = {};
    for (const [i, block] of this.layers.entries()) {
      for (const [branch, layers] of Object.entries(ADAPTED)) {
        for (const layer of layers) {
          const { lora_A, lora_B } = block[branch][layer].adapter, path = `model.layers.${i}.${branch}.${layer}`;
          Object.assign(params, { [`${path}.lora_A`]: lora_A, [`${path}.lora_B`]: lora_B });
        }
      }
    }
    return params;
  }
}

function gathered(embedding, ids) { // (V, d), N ids -> (N, d)
  const d = embedding.columns, x = Matrix.zeros(ids.length, d, embedding.data.constructor);
  ids.forEach((id, n) => x.data.set(embedding.data.subarray(id * d, (id + 1) * d), n * d));
  return x;
}
