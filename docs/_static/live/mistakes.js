// Five mistakes in LoRA, each as what it changes in lora.js. `layerWith(names)` builds a layer that has them. Two of
// them are starts, of which a layer has one. A label with a flag is that of a known bug, and begins as its sentence
// does in minilora/conformance/problems/bugs.py.

import { Linear, LoRA, LoRALinear } from "./lora.js";
import { gaussian, uniform } from "./random.js";

const fill = ({ data }, draw) => data.forEach((_, i) => { data[i] = draw(); });

export const MISTAKES = {
  "A-zero": {
    label: "A starts at zero, too",
    says: "With A and B zero, h and dh are zero, and so are both gradients, by (3) and (5): nothing ever moves.",
    start: ({ lora_A, lora_B }) => {
      fill(lora_A, () => 0);
      fill(lora_B, () => 0);
    },
  },
  "alpha-not-divided": {
    label: "alpha is not divided by the rank",
    flag: "alpha-is-not-divided-by-the-rank",
    says: "Output and gradients agree, so training goes on. But a program that divides reads these factors as a " +
      "change 1/r as strong.",
    LoRA: (Right) => class extends Right {
      get scaling() { return this.alpha; }
    },
  },
  "base-passes-no-gradient": {
    label: "dx lacks dy W: the base passes no gradient",
    flag: "dx-lacks-dy-w",
    says: "dx lacks dy W (12). This layer trains as before, and its loss cannot show it: only a layer below " +
      "would be misled.",
    LoRALinear: (Right) => class extends Right {
      backward(dy, cache) { return this.adapter.backward(dy, cache); }
    },
  },
  "B-not-zero": {
    label: "B does not start at zero",
    says: "A is not zero either, so the adapted layer no longer begins as its base: the first loss is another one, " +
      "and what the base knew is disturbed.",
    start: ({ lora_A, lora_B }, random) => {
      if (!lora_A.norm()) fill(lora_A, uniform(random, 1 / Math.sqrt(lora_A.columns))); // A zero would hide it
      fill(lora_B, uniform(random, 1));
    },
  },
  "wrong-scale-in-dA": {
    label: "lora_A's gradient has the scaling twice",
    flag: "lora-a-gradient-has-the-scaling-twice",
    says: "Adam divides by the gradient's own size, so its loss hardly changes; gradient descent moves A s times " +
      "too far.",
    LoRA: (Right) => class extends Right {
      backward(dy, cache) {
        const [dx, { lora_A, lora_B }] = super.backward(dy, cache);
        return [dx, { lora_A: lora_A.scaled(this.scaling), lora_B }];
      }
    },
  },
};

// How A and B begin.
export const STARTS = {
  peft: { label: "as PEFT: A uniform, B zero", begin: () => {} },
  gaussian: {
    label: "as the paper: A Gaussian, B zero",
    begin: ({ lora_A }, random) => fill(lora_A, gaussian(random)),
  },
  swapped: {
    label: "the other way round: A zero, B uniform",
    begin: ({ lora_A, lora_B, rank }, random) => {
      fill(lora_A, () => 0);
      fill(lora_B, uniform(random, 1 / Math.sqrt(rank)));
    },
  },
};

// Return { make, start }, as check.js and experiment.js ask for them, of a layer with these mistakes.
export function layerWith(names, start = "peft") {
  const made = names.map((name) => MISTAKES[name]);
  const wrong = (part, right) => made.reduce((found, mistake) => mistake[part]?.(found) ?? found, right);
  const [Adapter, Layer] = [wrong("LoRA", LoRA), wrong("LoRALinear", LoRALinear)];
  return {
    make: (weight, lora_A, lora_B, alpha) => new Layer(new Linear(weight), new Adapter(lora_A, lora_B, alpha)),
    start: (n_in, n_out, rank, alpha, random) => {
      const adapter = Adapter.init(n_in, n_out, { rank, alpha, random });
      STARTS[start].begin(adapter, random);
      for (const mistake of made) mistake.start?.(adapter, random);
      return adapter;
    },
  };
}
