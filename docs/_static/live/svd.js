// Singular values, by one-sided Jacobi rotations: turn pairs of rows until every two stand at a right angle. A rotation
// changes no singular value, and the singular values of a matrix with orthogonal rows are the rows' lengths.

import { Matrix } from "./matrix.js";

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

// Rows at right angles to each other, and the rotation that gives them: turned = rotation matrix.
function turnedRows({ rows, columns, data }) {
  const row = Array.from({ length: rows }, (_, i) => data.slice(i * columns, (i + 1) * columns));
  const rotation = row.map((_, i) => Float64Array.from(row, (_row, j) => (i === j ? 1 : 0)));
  for (let sweep = 0, turned = true; turned && sweep < 60; sweep += 1) {
    turned = false;
    for (let p = 0; p < rows; p += 1) {
      for (let q = p + 1; q < rows; q += 1) {
        const [pp, qq, pq] = [dot(row[p], row[p]), dot(row[q], row[q]), dot(row[p], row[q])];
        if (Math.abs(pq) <= 1e-15 * Math.sqrt(pp * qq)) continue;
        turned = true;
        const angle = Math.atan2(2 * pq, pp - qq) / 2, c = Math.cos(angle), s = Math.sin(angle);
        for (const of of [row, rotation]) {
          [of[p], of[q]] = [of[p].map((a, i) => c * a + s * of[q][i]), of[q].map((b, i) => c * b - s * of[p][i])];
        }
      }
    }
  }
  return { row, rotation };
}

export function singularValues(matrix) {
  const { row } = turnedRows(matrix.rows <= matrix.columns ? matrix : matrix.T);
  return row.map((r) => Math.sqrt(dot(r, r))).sort((a, b) => b - a);
}

const largestOf = (numbers) => numbers.reduce((most, value) => (Math.abs(value) > Math.abs(most) ? value : most));

// The matrix as a sum of columns times rows, the strongest first: { B, A } with B A the sum of the first `rank`,
// each column as long as its row, its largest entry above zero. No other B and A of this rank are nearer (Eckart and
// Young).
export function strongest(matrix, rank) {
  const { row, rotation } = turnedRows(matrix), length = row.map((r) => Math.sqrt(dot(r, r)));
  const order = length.map((_, k) => k).sort((a, b) => length[b] - length[a]).slice(0, rank);
  const root = order.map((k) => Math.sqrt(length[k])), up = order.map((k) => (largestOf(rotation[k]) < 0 ? -1 : 1));
  const B = Matrix.filled(matrix.rows, order.length, (_, i) => {
    const [o, k] = [Math.floor(i / order.length), i % order.length];
    return up[k] * rotation[order[k]][o] * root[k];
  });
  const A = Matrix.filled(order.length, matrix.columns, (_, i) => {
    const [k, j] = [Math.floor(i / matrix.columns), i % matrix.columns];
    return root[k] ? up[k] * row[order[k]][j] / root[k] : 0;
  });
  return { B, A };
}
