// NF4 in JavaScript, as minilora/layers/nf4.py has it without its double quantisation: a weight as one of 16 numbers,
// times the largest of its block.

export const NF4 = [
  -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
];
const BLOCK = 64;

// The matrix with each weight rounded so.
export function inFourBits(matrix) {
  const { data } = matrix, rounded = matrix.copy();
  for (let start = 0; start < data.length; start += BLOCK) {
    const block = data.subarray(start, start + BLOCK);
    const scale = block.reduce((most, w) => Math.max(most, Math.abs(w)), 0); // eq. (nf.3)
    block.forEach((w, i) => { rounded.data[start + i] = scale ? scale * nearest(w / scale) : 0; }); // eq. (nf.5)
  }
  return rounded;
}

function nearest(value) { // eq. (nf.4)
  return NF4.reduce((best, level) => (Math.abs(level - value) < Math.abs(best - value) ? level : best));
}
