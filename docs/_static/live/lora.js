// LoRA in plain JavaScript: minilora/linear.py and minilora/lora.py, with the same names and equation numbers.
//
//     y = x W^T + b + s x A^T B^T        W (out, in), A (r, in), B (out, r), s = alpha / r
//
// The derivation has every equation. Here x is (N, in), and dy, dx, dA, dB are the gradients of a loss.

import { Matrix } from "./matrix.js";
import { uniform } from "./random.js";

// The layer that is adapted. It is frozen: it passes the gradient on, and forms none of its own.
export class Linear {
  constructor(weight, bias = null) {
    [this.weight, this.bias] = [weight, bias];
  }

  forward(x) { // (N, in) -> (N, out)
    const y = x.times(this.weight.T); // eq. (7)
    return this.bias ? y.plusRow(this.bias) : y;
  }

  inputGradient(dy) { // (N, out) -> (N, in)
    return dy.times(this.weight); // eq. (10)
  }
}

// The added path, y = s x A^T B^T.
export class LoRA {
  constructor(lora_A, lora_B, alpha) {
    [this.lora_A, this.lora_B, this.alpha] = [lora_A, lora_B, alpha];
  }

  get rank() { return this.lora_A.rows; }

  get scaling() { return this.alpha / this.rank; }

  forward(x) { // (N, in) -> (N, out), and what backward needs
    const h = x.times(this.lora_A.T); // eq. (1)
    const y = h.scaled(this.scaling).times(this.lora_B.T); // eq. (2)
    return [y, { x, h }];
  }

  backward(dy, { x, h }) { // (N, out) -> (N, in), and the gradients of both factors
    const dh = dy.times(this.lora_B).scaled(this.scaling); // eq. (4)
    const dx = dh.times(this.lora_A); // eq. (6)
    const dB = dy.T.times(h).scaled(this.scaling); // eq. (3)
    const dA = dh.T.times(x); // eq. (5)
    return [dx, { lora_A: dA, lora_B: dB }];
  }

  delta() { // -> (out, in)
    return this.lora_B.scaled(this.scaling).times(this.lora_A); // eq. (13)
  }

  trainable() { return { lora_A: this.lora_A, lora_B: this.lora_B }; }

  // As PEFT does: A uniform in +-1/sqrt(in), B zero, so that the adapter adds nothing yet.
  static init(n_in, n_out, { rank, alpha, random, Numbers = Float64Array }) {
    const lora_A = Matrix.filled(rank, n_in, uniform(random, 1 / Math.sqrt(n_in)), Numbers);
    return new this(lora_A, Matrix.zeros(n_out, rank, Numbers), alpha);
  }
}

// A frozen layer and its adapter side by side.
export class LoRALinear {
  constructor(base, adapter) {
    [this.base, this.adapter] = [base, adapter];
  }

  forward(x) {
    const [update, cache] = this.adapter.forward(x);
    const y = this.base.forward(x).plus(update); // eq. (11)
    return [y, cache];
  }

  backward(dy, cache) {
    const [dx_adapter, grads] = this.adapter.backward(dy, cache);
    const dx = this.base.inputGradient(dy).plus(dx_adapter); // eq. (12)
    return [dx, grads];
  }

  merge() {
    return new Linear(this.base.weight.plus(this.adapter.delta()), this.base.bias); // eq. (14)
  }
}
