/* LoRA in C, held against minilora's vectors. It reads problems, computes y, dx, dA, dB and the merged weight, and writes
 * them:
 *
 *     minilora vectors vectors --kind linear
 *     cc -O2 -o lora examples/conformance/lora.c && mkdir results
 *     ./lora results vectors/linear-*.safetensors
 *     minilora vectors vectors --compare results
 *
 * With -DFORGET_SCALING it has a bug, which the last command names. It computes in double, whatever the case's precision.
 * A safetensors file is 8 bytes with the header's length, the header in JSON, and the tensors' bytes. This reader takes
 * the files that minilora writes: it looks for a tensor's name, and reads its dtype, shape and place. The host must be
 * little-endian, as the files are.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    double *at; /* NULL where the file has no such tensor */
    size_t rows, columns; /* of a vector, its length and 1 */
} Matrix;

typedef struct {
    char *header;
    unsigned char *bytes;
    size_t size; /* of the bytes */
} File;

static void fail(const char *what, const char *name) {
    fprintf(stderr, "lora: %s: %s\n", what, name);
    exit(2);
}

static void *some(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) fail("out of memory", "calloc");
    return memory;
}

static Matrix zeros(size_t rows, size_t columns) {
    return (Matrix){some(rows * columns, sizeof(double)), rows, columns};
}

/* ---- reading ---------------------------------------------------------------------------------- */

static File open_tensors(const char *path) {
    FILE *file = fopen(path, "rb");
    uint64_t length;
    if (!file || fread(&length, 8, 1, file) != 1) fail("cannot read", path);
    fseek(file, 0, SEEK_END);
    uint64_t end = (uint64_t)ftell(file);
    if (end < 8 || length > end - 8) fail("not a safetensors file", path);
    File found = {some(length + 1, 1), some(end - 8 - length, 1), end - 8 - length};
    fseek(file, 8, SEEK_SET);
    if (fread(found.header, 1, length, file) != length || fread(found.bytes, 1, found.size, file) != found.size)
        fail("cannot read", path);
    fclose(file);
    return found;
}

/* Return a tensor of one or two axes, in double. */
static Matrix tensor(const File *file, const char *name) {
    char key[80], dtype[8];
    size_t from, to;
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(file->header, key);
    if (!entry) return (Matrix){NULL, 0, 0};
    const char *shape = strstr(entry, "\"shape\":["), *place = strstr(entry, "\"data_offsets\":[");
    const char *type = strstr(entry, "\"dtype\":\"");
    size_t rows = 1, columns = 1;
    if (!shape || !place || !type || sscanf(type, "\"dtype\":\"%7[^\"]", dtype) != 1
        || sscanf(shape, "\"shape\":[%zu,%zu]", &rows, &columns) < 1
        || sscanf(place, "\"data_offsets\":[%zu,%zu]", &from, &to) != 2 || to > file->size || from > to)
        fail("cannot understand the header's entry", name);
    size_t width = strcmp(dtype, "F64") == 0 ? 8 : strcmp(dtype, "F32") == 0 ? 4 : 0;
    if (!width || to - from != rows * columns * width) fail("cannot read numbers of this kind", name);
    Matrix found = zeros(rows, columns);
    for (size_t i = 0; i < rows * columns; i++) {
        float single;
        if (width == 8) memcpy(&found.at[i], file->bytes + from + 8 * i, 8);
        else memcpy(&single, file->bytes + from + 4 * i, 4), found.at[i] = single;
    }
    return found;
}

/* ---- LoRA --------------------------------------------------------------------------------------- */

/* Return s X Y, with X or Y transposed where that is asked for. */
static Matrix product(double s, Matrix X, int X_transposed, Matrix Y, int Y_transposed) {
    size_t rows = X_transposed ? X.columns : X.rows, inner = X_transposed ? X.rows : X.columns;
    size_t columns = Y_transposed ? Y.rows : Y.columns;
    Matrix Z = zeros(rows, columns);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            double sum = 0;
            for (size_t k = 0; k < inner; k++)
                sum += X.at[X_transposed ? k * X.columns + i : i * X.columns + k]
                       * Y.at[Y_transposed ? j * Y.columns + k : k * Y.columns + j];
            Z.at[i * columns + j] = s * sum;
        }
    return Z;
}

static Matrix plus(Matrix X, Matrix Y) {
    for (size_t i = 0; i < X.rows * X.columns; i++) X.at[i] += Y.at[i];
    return X;
}

enum { Y_, DX, DA, DB, MERGED, ANSWERS };
static const char *const NAMES[ANSWERS] = {"y", "dx", "dA", "dB", "merged"};

static void lora(const File *file, Matrix answers[ANSWERS]) {
    Matrix x = tensor(file, "x"), dy = tensor(file, "dy"), W = tensor(file, "weight"), b = tensor(file, "bias");
    Matrix A = tensor(file, "lora_A"), B = tensor(file, "lora_B"), alpha = tensor(file, "alpha");
    if (!x.at || !dy.at || !W.at || !A.at || !B.at || !alpha.at) fail("lacks a tensor of the problem", "a case");
#ifdef FORGET_SCALING
    double s = alpha.at[0];
#else
    double s = alpha.at[0] / (double)A.rows;
#endif
    Matrix h = product(1, x, 0, A, 1);
    Matrix y = plus(product(1, x, 0, W, 1), product(s, h, 0, B, 1));
    for (size_t i = 0; b.at && i < y.rows * y.columns; i++) y.at[i] += b.at[i % y.columns];
    Matrix dh = product(s, dy, 0, B, 0);
    answers[Y_] = y;
    answers[DX] = plus(product(1, dy, 0, W, 0), product(1, dh, 0, A, 0));
    answers[DA] = product(1, dh, 1, x, 0);
    answers[DB] = product(s, dy, 1, h, 0);
    answers[MERGED] = plus(product(s, B, 0, A, 0), W);
}

/* ---- writing ------------------------------------------------------------------------------------ */

static void save(const char *path, const Matrix answers[ANSWERS]) {
    char header[1024];
    size_t length = 0, end = 0;
    for (int i = 0; i < ANSWERS; i++) {
        size_t start = end;
        end += 8 * answers[i].rows * answers[i].columns;
        length += (size_t)snprintf(header + length, sizeof header - length,
                                   "%s\"%s\":{\"dtype\":\"F64\",\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]}",
                                   i ? "," : "{", NAMES[i], answers[i].rows, answers[i].columns, start, end);
    }
    header[length++] = '}';
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot write", path);
    uint64_t count = length;
    int sound = fwrite(&count, 8, 1, file) == 1 && fwrite(header, 1, length, file) == length;
    for (int i = 0; i < ANSWERS; i++)
        sound = sound && fwrite(answers[i].at, 8 * answers[i].columns, answers[i].rows, file) == answers[i].rows;
    if (fclose(file) || !sound) fail("cannot write", path);
}

int main(int count, char **arguments) {
    if (count < 3) fail("usage", "lora RESULTS CASE.safetensors ...");
    for (int i = 2; i < count; i++) {
        const char *slash = strrchr(arguments[i], '/'), *name = slash ? slash + 1 : arguments[i];
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", arguments[1], name) >= (int)sizeof path) fail("too long", name);
        File file = open_tensors(arguments[i]);
        Matrix answers[ANSWERS];
        lora(&file, answers);
        save(path, answers); /* the memory goes back when the process ends */
    }
    return 0;
}
