// Matrices for the pages that train in the browser: rows in one typed array, float64 or float32 as it is made.
//
//     x.times(A.T)       x A^T, as NumPy's x @ A.T
//
// Nothing is changed in place, but by the optimizer, which writes into `data`.

export class Matrix {
  constructor(rows, columns, data) {
    if (data.length !== rows * columns) {
      throw new RangeError(`${data.length} numbers are no ${rows} by ${columns} matrix`);
    }
    [this.rows, this.columns, this.data] = [rows, columns, data];
    this.turnedFrom = null;
  }

  static zeros(rows, columns, Numbers = Float64Array) {
    return new Matrix(rows, columns, new Numbers(rows * columns));
  }

  // Each entry is what `draw` returns, as of a random generator.
  static filled(rows, columns, draw, Numbers = Float64Array) {
    return new Matrix(rows, columns, Numbers.from({ length: rows * columns }, draw));
  }

  // The transpose, a copy. Its own transpose is this matrix again, which costs nothing.
  get T() {
    if (this.turnedFrom) return this.turnedFrom;
    const { rows, columns, data } = this, turned = Matrix.zeros(columns, rows, data.constructor);
    for (let i = 0; i < rows; i += 1) {
      for (let j = 0; j < columns; j += 1) turned.data[j * rows + i] = data[i * columns + j];
    }
    turned.turnedFrom = this;
    return turned;
  }

  times(other) { // (n, k), (k, m) -> (n, m)
    if (this.columns !== other.rows) {
      const sizes = `(${this.rows}, ${this.columns}) times (${other.rows}, ${other.columns})`;
      throw new RangeError(`${sizes}: the inner sizes differ`);
    }
    const product = Matrix.zeros(this.rows, other.columns, this.data.constructor);
    dots(this.data, other.T.data, product.data, this.rows, other.columns, this.columns);
    return product;
  }

  // f of each entry, or of the entries of two matrices.
  map(f) {
    return new Matrix(this.rows, this.columns, this.data.map(f));
  }

  with(other, f) {
    if (this.rows !== other.rows || this.columns !== other.columns) {
      throw new RangeError("the two matrices have two shapes");
    }
    return new Matrix(this.rows, this.columns, this.data.map((value, i) => f(value, other.data[i])));
  }

  plus(other) { return this.with(other, (a, b) => a + b); }

  minus(other) { return this.with(other, (a, b) => a - b); }

  scaled(factor) { return this.map((a) => factor * a); }

  // A row added to each row.
  plusRow(row) { return this.map((a, i) => a + row[i % this.columns]); }

  copy() { return this.map((a) => a); }

  norm() { return Math.sqrt(this.data.reduce((sum, a) => sum + a * a, 0)); }
}

// The size of a matrix's largest entry; never 0, so that one can divide by it.
export const largest = ({ data }) => data.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);

// c_ij = sum_t a_it b_jt: rows of a (n, k) with rows of b (m, k). Eight sums at a time, so that each number that is
// read from memory is used in two or four of them: this is four times as fast as one sum at a time.
function dots(a, b, c, n, m, k) {
  const [n2, m4] = [n - (n % 2), m - (m % 4)];
  for (let i = 0; i < n2; i += 2) {
    for (let j = 0; j < m4; j += 4) {
      const p0 = i * k, p1 = p0 + k, q0 = j * k, q1 = q0 + k, q2 = q1 + k, q3 = q2 + k;
      let c00 = 0, c01 = 0, c02 = 0, c03 = 0, c10 = 0, c11 = 0, c12 = 0, c13 = 0;
      for (let t = 0; t < k; t += 1) {
        const a0 = a[p0 + t], a1 = a[p1 + t], b0 = b[q0 + t], b1 = b[q1 + t], b2 = b[q2 + t], b3 = b[q3 + t];
        c00 += a0 * b0; c01 += a0 * b1; c02 += a0 * b2; c03 += a0 * b3;
        c10 += a1 * b0; c11 += a1 * b1; c12 += a1 * b2; c13 += a1 * b3;
      }
      const o0 = i * m + j, o1 = o0 + m;
      c[o0] = c00; c[o0 + 1] = c01; c[o0 + 2] = c02; c[o0 + 3] = c03;
      c[o1] = c10; c[o1 + 1] = c11; c[o1 + 2] = c12; c[o1 + 3] = c13;
    }
  }
  const one = (i, j) => { // the rows and columns that are left over
    let sum = 0;
    for (let t = 0; t < k; t += 1) sum += a[i * k + t] * b[j * k + t];
    c[i * m + j] = sum;
  };
  for (let i = 0; i < n; i += 1) {
    for (let j = i < n2 ? m4 : 0; j < m; j += 1) one(i, j);
  }
}
