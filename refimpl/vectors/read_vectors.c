/* Test vectors of the DeepSeek-V3 specification, for an engine in C: reads index.txt, gives each vector to engine(), judges what it gave.

       cc -O2 -o check read_vectors.c -lm && ./check DIR

   Put your functions into engine(); what it returns NULL for is counted as left. Numbers are doubles here, whatever they are in the files.
   -DWRONG=1.001 makes the example wrong. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef WRONG
#define WRONG 1.0
#endif
enum { NAME = 160, ARRAYS = 96, SETTINGS = 32 };

typedef struct { char name[NAME]; long count, last; double *x; } array; /* last: size of the last axis; x NULL if absent */
typedef struct { char name[NAME], value[NAME]; } setting;
typedef struct {
    char id[NAME], stage[NAME], kind[16];
    double limit, lean, floor;
    int parts, arrays, settings; /* parts: of a gradient, which this reader does not take apart */
    array in[ARRAYS], out;
    setting set[SETTINGS];
} vector;

static void die(const char *what, const char *of) { fprintf(stderr, "%s: %s\n", of, what), exit(2); }

static double number(const unsigned char *p, const char *dtype) {
    uint32_t u;
    float f;
    if (!strcmp(dtype, "F8_E4M3")) {
        int e = p[0] >> 3 & 15, m = p[0] & 7;
        double size = (p[0] & 127) == 127 ? NAN : e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
        return p[0] & 128 ? -size : size;
    }
    if (!strcmp(dtype, "BF16")) return u = (uint32_t)(p[0] | p[1] << 8) << 16, memcpy(&f, &u, 4), f;
    u = p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
    if (!strcmp(dtype, "I32")) return (int32_t)u;
    if (!strcmp(dtype, "F32")) return memcpy(&f, &u, 4), f;
    die("unknown dtype", dtype);
    return 0;
}

static array load(const char *folder, char *line) { /* DTYPE FILE OFFSET DIMS SIZE... */
    array a = {"", 1, 1, NULL};
    char dtype[16], file[NAME], path[4096];
    long offset;
    int dims, used, size;
    if (sscanf(line, "%15s %159s %ld %d%n", dtype, file, &offset, &dims, &used) != 4) die("not a place of an array", line);
    for (char *p = line + used; dims-- > 0; a.count *= a.last) a.last = strtol(p, &p, 10);
    snprintf(path, sizeof path, "%s/%s", folder, file);
    size = !strcmp(dtype, "F8_E4M3") ? 1 : !strcmp(dtype, "BF16") ? 2 : 4;
    FILE *f = fopen(path, "rb");
    unsigned char *raw = malloc(a.count * size + 1);
    if (!f || fseek(f, offset, SEEK_SET) || fread(raw, size, a.count, f) != (size_t)a.count) die("cannot be read", path);
    fclose(f);
    a.x = malloc(a.count * sizeof *a.x + 1);
    for (long i = 0; i < a.count; i++) a.x[i] = number(raw + i * size, dtype);
    free(raw);
    return a;
}

static int next(FILE *index, const char *folder, vector *v) { /* 1, or 0 at the end */
    static char line[1 << 16];
    int used;
    memset(v, 0, sizeof *v);
    while (fgets(line, sizeof line, index)) {
        char *rest = strchr(line, ' ') + 1, name[NAME];
        if (!strncmp(line, "vector ", 7))
            sscanf(rest, "%159s %159s %15s %lf %lf %lf", v->id, v->stage, v->kind, &v->limit, &v->lean, &v->floor);
        else if (!strncmp(line, "part ", 5))
            v->parts++;
        else if (!strncmp(line, "out ", 4))
            return v->out = load(folder, rest), 1;
        else if (v->parts || strchr("vpg", line[0]))
            continue;
        else if (!strncmp(line, "set ", 4) && v->settings < SETTINGS)
            sscanf(rest, "%159s %159[^\n]", v->set[v->settings].name, v->set[v->settings].value), v->settings++;
        else if (!strncmp(line, "in ", 3) && v->arrays < ARRAYS) {
            sscanf(rest, "%159s %n", name, &used);
            v->in[v->arrays] = load(folder, rest + used);
            strcpy(v->in[v->arrays++].name, name);
        }
    }
    return 0;
}

static array *input(vector *v, const char *name) { /* an argument, or NULL */
    for (int i = 0; i < v->arrays; i++)
        if (!strcmp(v->in[i].name, name)) return &v->in[i];
    return NULL;
}

static double setting_of(vector *v, const char *name) {
    for (int i = 0; i < v->settings; i++)
        if (!strcmp(v->set[i].name, name)) return atof(v->set[i].value);
    return 0;
}

static int sorted(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

static int judge(vector *v, double *x) { /* 1 if x is right */
    double *e = v->out.x, most = 0, far = 0, along = 0, all = 0;
    long n = v->out.last ? v->out.last : 1, count = v->out.count, differ = 0;
    for (long i = 0; i < count; i++)
        if (isinf(e[i]) && x[i] < -9e3) x[i] = e[i] = 0; /* masked, in both */
    if (!strcmp(v->kind, "set"))
        for (long i = 0; i < count; i += n) qsort(x + i, n, sizeof *x, sorted), qsort(e + i, n, sizeof *e, sorted);
    if (strcmp(v->kind, "value")) {
        int each = !strcmp(v->kind, "each");
        for (long i = 0; i < count; i++) differ += each ? !(fabs(x[i] - e[i]) <= v->limit * fabs(e[i])) : x[i] != e[i];
        return differ <= (each ? 0 : v->limit);
    }
    for (int pass = 0; pass < 2; pass++) /* the largest row first: no row counts as less than a share of it */
        for (long i = 0; i < count; i += n) {
            double d = 0, size = 0;
            for (long j = i; j < i + n; j++) d += (x[j] - e[j]) * (x[j] - e[j]), size += e[j] * e[j];
            if (!pass) most = fmax(most, size);
            for (long j = i; pass && j < i + n; j++) along += (x[j] - e[j]) * e[j];
            if (pass) far = !isfinite(d) ? INFINITY : fmax(far, sqrt(d / fmax(size, fmax(v->floor * v->floor * most, 1e-300))));
            all += pass ? size : 0;
        }
    return far <= v->limit && (count < 16 || fabs(along) <= v->lean * all);
}

/* ---- The engine: RMSNorm and plain linear layers, as an example */

static double *engine(vector *v) {
    array *x = input(v, "x"), *w = input(v, "w"), *b = input(v, "b");
    double *y = malloc(v->out.count * sizeof *y + 1);
    if (strstr(v->stage, "norm") && x && w && !v->parts) {
        for (long i = 0; i < x->count; i += x->last) {
            double sum = 0;
            for (long j = 0; j < x->last; j++) sum += x->x[i + j] * x->x[i + j];
            for (long j = 0; j < x->last; j++) y[i + j] = WRONG * w->x[j] * x->x[i + j] / sqrt(sum / x->last + setting_of(v, "eps"));
        }
        return y;
    }
    if (!v->parts && x && w && w->last == x->last && v->out.count * x->last == x->count * (w->count / w->last)) {
        long rows = x->count / x->last, wide = w->count / w->last;
        for (long i = 0; i < rows * wide; i++) {
            y[i] = b ? b->x[i % wide] : 0;
            for (long k = 0; k < x->last; k++) y[i] += WRONG * x->x[i / wide * x->last + k] * w->x[i % wide * x->last + k];
        }
        return y;
    }
    free(y);
    return NULL;
}

int main(int argc, char **argv) {
    static vector v;
    char path[4096], head[1 << 12];
    int right = 0, wrong = 0, left = 0;
    if (argc != 2) die("usage: check DIR", argv[0]);
    snprintf(path, sizeof path, "%s/index.txt", argv[1]);
    FILE *index = fopen(path, "r");
    if (!index || !fgets(head, sizeof head, index) || strncmp(head, "refimpl-vectors/1 ", 18)) die("no index of these vectors", path);
    while (next(index, argv[1], &v)) {
        double *y = engine(&v);
        int ok = y && judge(&v, y);
        if (y && !ok) printf("%s: wrong\n", v.id);
        y ? ok ? right++ : wrong++ : left++;
        free(y), free(v.out.x);
        for (int i = 0; i < v.arrays; i++) free(v.in[i].x);
    }
    printf("%d right, %d wrong, %d left\n", right, wrong, left);
    return wrong || !right;
}
