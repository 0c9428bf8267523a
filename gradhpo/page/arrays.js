// Arrays inside the JSON, as `packed` wrote them.
const KINDS = { f4: Float32Array, i4: Int32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };

function array(given) {
  const text = atob(given.bytes), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new KINDS[given.kind](bytes.buffer);
}

function joined(one, other) {
  if (!one || !one.length) return other;
  const made = new one.constructor(one.length + other.length);
  made.set(one);
  made.set(other, one.length);
  return made;
}

const range = (n) => Array.from({ length: n }, (_, i) => i);
