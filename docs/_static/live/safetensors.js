// The file format of weights and adapters: 8 bytes with the header's length, a header in JSON, then the numbers.

import { Matrix } from "./matrix.js";

const WIDTH = { F16: 2, F32: 4, F64: 8 };
const READ = {
  F16: (view, at) => half(view.getUint16(at, true)),
  F32: (view, at) => view.getFloat32(at, true),
  F64: (view, at) => view.getFloat64(at, true),
};

// One number of half precision from its 16 bits: a sign, 5 bits of exponent, 10 of fraction.
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
}

// Return the tensors of a file by name. Each is { shape, data }: F64 as Float64Array, F32 and F16 as Float32Array.
export function readSafetensors(buffer) {
  const view = new DataView(buffer), length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (!WIDTH[dtype]) continue; // integers, which no page asks for
    const count = (to - from) / WIDTH[dtype], data = new (dtype === "F64" ? Float64Array : Float32Array)(count);
    for (let i = 0; i < count; i += 1) data[i] = READ[dtype](view, 8 + length + from + i * WIDTH[dtype]);
    tensors[name] = { shape, data };
  }
  return tensors;
}

export const matrixOf = ({ shape, data }) => new Matrix(shape.length > 1 ? shape[0] : 1, shape.at(-1), data);

// Return the bytes of a file of matrices, in the order of their names.
export function writeSafetensors(matrices) {
  const header = { __metadata__: { format: "pt" } };
  const entries = Object.entries(matrices).sort(([a], [b]) => (a < b ? -1 : 1));
  let end = 0;
  for (const [name, { rows, columns, data }] of entries) {
    const dtype = data instanceof Float64Array ? "F64" : "F32";
    header[name] = { dtype, shape: [rows, columns], data_offsets: [end, end += data.length * WIDTH[dtype]] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8); // the numbers begin at a multiple of 8 bytes
  const bytes = new Uint8Array(8 + text.length + end), view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(text.length), true);
  bytes.set(new TextEncoder().encode(text), 8);
  let at = 8 + text.length;
  for (const [, { data }] of entries) {
    for (const value of data) {
      if (data instanceof Float64Array) view.setFloat64(at, value, true); else view.setFloat32(at, value, true);
      at += data.BYTES_PER_ELEMENT;
    }
  }
  return bytes;
}
