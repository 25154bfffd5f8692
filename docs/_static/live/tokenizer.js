// glassllm's tokenizer: characters are merged pair by pair, the pair that was learned first first, within chunks that
// begin with spaces and end before the next.

const SPACE = "▁", SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"], UNKNOWN = 1;

export class Tokenizer {
  // `alphabet` and `merges` are those of its .tokenizer.json.
  constructor({ alphabet, merges }) {
    this.vocabulary = [...SPECIALS, ...alphabet, ...merges.map(([a, b]) => a + b)];
    this.ids = new Map(this.vocabulary.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map(([a, b], rank) => [`${a}\0${b}`, rank]));
    this.known = new Map(); // the ids of chunks that were met before
  }

  encode(text) {
    const chunks = text.normalize("NFC").replaceAll(" ", SPACE).match(/\n|▁*[^▁\n]+|▁+/gu) ?? [];
    return chunks.flatMap((chunk) => {
      if (!this.known.has(chunk)) {
        this.known.set(chunk, this.merged([...chunk]).map((token) => this.ids.get(token) ?? UNKNOWN));
      }
      return this.known.get(chunk);
    });
  }

  // Merge the pair of the lowest rank wherever it stands, until no pair has a rank.
  merged(symbols) {
    for (;;) {
      let best = Infinity, pair = null;
      for (let i = 0; i + 1 < symbols.length; i += 1) {
        const rank = this.ranks.get(`${symbols[i]}\0${symbols[i + 1]}`) ?? Infinity;
        if (rank < best) [best, pair] = [rank, [symbols[i], symbols[i + 1]]];
      }
      if (!pair) return symbols;
      const next = [];
      for (let i = 0; i < symbols.length; i += 1) {
        const meets = symbols[i] === pair[0] && symbols[i + 1] === pair[1];
        next.push(meets ? pair[0] + pair[1] : symbols[i]);
        if (meets) i += 1;
      }
      symbols = next;
    }
  }

  decode(ids) {
    const text = (id) => (id === UNKNOWN ? "⁇" : SPECIALS[id] === undefined ? this.vocabulary[id] : "");
    return ids.map(text).join("").replaceAll(SPACE, " ");
  }

  unknown(ids) { return ids.filter((id) => id === UNKNOWN).length; }
}
