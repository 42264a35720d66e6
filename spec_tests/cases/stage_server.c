/* A stage server of a page: RMSNorm for `refimpl conform --cmd`, one JSON object a line, arrays in raw files.

   It looks for the few fields that it needs and answers "lacking" to everything else. -DWRONG=1.01 makes a wrong one. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef WRONG
#define WRONG 1.0
#endif

static char line[1 << 20];

static long field(const char *at, const char *key) { /* a number */
    const char *p = strstr(at, key);
    return p ? strtol(p + strlen(key), NULL, 10) : -1;
}

static float *array(const char *name, long *count, long *last) { /* {"dtype": "float32", "shape": [..], "path": ".."} */
    char key[64], path[4096];
    snprintf(key, sizeof key, "\"%s\": {\"dtype\": \"float32\", \"shape\": [", name);
    const char *p = strstr(line, key);
    if (!p) return NULL;
    p += strlen(key);
    *count = 1;
    do {
        *last = strtol(p, (char **)&p, 10);
        *count *= *last;
        p += *p == ',';
    } while (*p != ']');
    if (sscanf(strstr(p, "\"path\": \"") + 9, "%4095[^\"]", path) != 1) return NULL;
    float *x = (float *)malloc(*count * sizeof *x + 1);
    FILE *f = fopen(path, "rb");
    if (!f || fread(x, sizeof *x, *count, f) != (size_t)*count) return NULL;
    fclose(f);
    return x;
}

static void norm(long seq, const char *folder) {
    long n, d, k, unused;
    float *x = array("x", &n, &d), *w = array("w", &k, &unused);
    double eps = atof(strstr(line, "\"eps\": ") + 7);
    char path[5000];
    for (long i = 0; i < n; i += d) {
        double sum = 0;
        for (long j = 0; j < d; j++) sum += (double)x[i + j] * x[i + j];
        for (long j = 0; j < d; j++) x[i + j] = (float)(WRONG * w[j] * x[i + j] / sqrt(sum / d + eps));
    }
    snprintf(path, sizeof path, "%s/answer%ld.bin", folder, seq);
    FILE *f = fopen(path, "wb");
    fwrite(x, sizeof *x, n, f);
    fclose(f);
    const char *shape = strchr(strstr(line, "\"x\": {"), '['), *end = strchr(shape, ']');
    printf("{\"seq\": %ld, \"status\": \"ok\", \"result\": {\"dtype\": \"float32\", \"shape\": %.*s, \"path\": \"%s\"}}\n", seq,
           (int)(end - shape + 1), shape, path);
    free(x), free(w);
}

int main(void) {
    char folder[4096] = "";
    while (fgets(line, sizeof line, stdin)) {
        long seq = field(line, "\"seq\": ");
        if (strstr(line, "\"do\": \"stop\"")) return 0;
        if (strstr(line, "\"do\": \"info\"")) {
            if (sscanf(strstr(line, "\"folder\": \"") + 11, "%4095[^\"]", folder) != 1) return 1;
            printf("{\"seq\": %ld, \"status\": \"ok\", \"result\": {\"name\": \"rmsnorm.c\", \"version\": \"1\"}}\n", seq);
        } else if (strstr(line, "\"do\": \"stage\"") && strstr(line, "_norm\"") && strstr(line, "\"x\": {"))
            norm(seq, folder);
        else
            printf("{\"seq\": %ld, \"status\": \"lacking\", \"text\": \"only norms\"}\n", seq);
        fflush(stdout);
    }
    return 0;
}
