// The codes of format "trellis" (pack/trellis.py, RATES): X(bits, values) of a step. Everything that asks which there are, or goes
// from a code in memory to one known when compiling, is written from this list.
#ifndef MOECOMPRESS_TRELLIS_CODES_H
#define MOECOMPRESS_TRELLIS_CODES_H

#define MOEC_TRELLIS_CODES(X) \
  X(3, 1) X(4, 1) X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(5, 2) X(3, 4) X(5, 4)

namespace {

constexpr int code_number(int bits, int vector) { return vector * 16 + bits; }

inline bool known(int bits, int vector) {
#define MOEC_IS(B, V) \
  if (bits == B && vector == V) return true;
  MOEC_TRELLIS_CODES(MOEC_IS)
#undef MOEC_IS
  return false;
}

}  // namespace

#endif
