// minilora/optim.py in JavaScript, and plain gradient descent beside it. Both write into the parameters' arrays.

// Step t of Adam, counted from 1, for one array: theta, m and v change in place.
function adamUpdate(theta, g, m, v, t, lr, [beta1, beta2], eps) {
  for (let i = 0; i < theta.length; i += 1) {
    m[i] = beta1 * m[i] + (1 - beta1) * g[i]; // eq. (20)
    v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2; // eq. (21)
    const m_hat = m[i] / (1 - beta1 ** t); // eq. (22)
    const v_hat = v[i] / (1 - beta2 ** t); // eq. (23)
    theta[i] -= lr * m_hat / (Math.sqrt(v_hat) + eps); // eq. (24)
  }
}

export class Adam {
  constructor(params, lr = 1e-3, betas = [0.9, 0.999], eps = 1e-8) {
    [this.params, this.lr, this.betas, this.eps, this.t] = [params, lr, betas, eps, 0];
    [this.m, this.v] = [{}, {}];
    for (const [name, { data }] of Object.entries(params)) {
      [this.m[name], this.v[name]] = [new data.constructor(data.length), new data.constructor(data.length)];
    }
  }

  step(grads) {
    this.t += 1;
    for (const [name, { data }] of Object.entries(this.params)) {
      adamUpdate(data, grads[name].data, this.m[name], this.v[name], this.t, this.lr, this.betas, this.eps);
    }
  }
}

export class GradientDescent {
  constructor(params, lr) {
    [this.params, this.lr] = [params, lr];
  }

  step(grads) { // theta_t = theta_{t-1} - lr g
    for (const [name, { data }] of Object.entries(this.params)) {
      grads[name].data.forEach((g, i) => { data[i] -= this.lr * g; });
    }
  }
}
