// Random numbers from a seed, so that one seed gives one start: Math.random has none.

// Return a function that draws uniformly from [0, 1): the generator mulberry32.
export function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

export const uniform = (random, bound) => () => bound * (2 * random() - 1);

// Box and Muller: a length and an angle make one Gaussian number.
export const gaussian = (random) => () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
