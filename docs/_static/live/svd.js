// Singular values, by one-sided Jacobi rotations: turn pairs of rows until every two stand at a right angle. A rotation
// changes no singular value, and the singular values of a matrix with orthogonal rows are the rows' lengths.

export function singularValues(matrix) {
  const { rows, columns, data } = matrix.rows <= matrix.columns ? matrix.copy() : matrix.T;
  const row = Array.from({ length: rows }, (_, i) => data.slice(i * columns, (i + 1) * columns));
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  for (let sweep = 0, turned = true; turned && sweep < 60; sweep += 1) {
    turned = false;
    for (let p = 0; p < rows; p += 1) {
      for (let q = p + 1; q < rows; q += 1) {
        const [pp, qq, pq] = [dot(row[p], row[p]), dot(row[q], row[q]), dot(row[p], row[q])];
        if (Math.abs(pq) <= 1e-15 * Math.sqrt(pp * qq)) continue;
        turned = true;
        const angle = Math.atan2(2 * pq, pp - qq) / 2, c = Math.cos(angle), s = Math.sin(angle);
        [row[p], row[q]] = [row[p].map((a, i) => c * a + s * row[q][i]), row[q].map((b, i) => c * b - s * row[p][i])];
      }
    }
  }
  return row.map((r) => Math.sqrt(dot(r, r))).sort((a, b) => b - a);
}
