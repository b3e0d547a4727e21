/* Counts the calls that change files and, at a chosen one, fails with ENOSPC or kills the process.
 *
 * cc -shared -fPIC -o faults.so faults.c -ldl
 * LD_PRELOAD=./faults.so PROGRAM, which calls redpass_arm(number, errno) through ctypes: errno 0
 * kills. Only calls on regular files below the folder in redpass_root count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long at = -1, seen = 0;
static int failure = 0;
static char root[PATH_MAX] = "";

void redpass_arm(long number, int error, const char *folder) {
    seen = 0;
    failure = error;
    strncpy(root, folder, sizeof root - 1);
    at = number;
}

long redpass_seen(void) { return seen; }

static int below(const char *path) { return at >= 0 && path && strncmp(path, root, strlen(root)) == 0; }

static int ours(int number) {
    char link[64], path[PATH_MAX];
    if (at < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", number);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

/* A full disk stays full: every later call that needs room fails as well. */
static int hit(int counts) {
    if (!counts || ++seen < at || (seen > at && !failure)) return 0;
    if (!failure) raise(SIGKILL);
    errno = failure;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int n, const void *d, size_t s) { REAL(ssize_t, "write", int, const void *, size_t); return hit(ours(n)) ? -1 : real(n, d, s); }
ssize_t pwrite(int n, const void *d, size_t s, off_t o) { REAL(ssize_t, "pwrite", int, const void *, size_t, off_t); return hit(ours(n)) ? -1 : real(n, d, s, o); }
ssize_t pwrite64(int n, const void *d, size_t s, off64_t o) { REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t); return hit(ours(n)) ? -1 : real(n, d, s, o); }
ssize_t writev(int n, const struct iovec *v, int c) { REAL(ssize_t, "writev", int, const struct iovec *, int); return hit(ours(n)) ? -1 : real(n, v, c); }
int fsync(int n) { REAL(int, "fsync", int); return hit(ours(n)) ? -1 : 0; /* a sweep need not wait */ }
int mkdir(const char *p, mode_t m) { REAL(int, "mkdir", const char *, mode_t); return hit(below(p)) ? -1 : real(p, m); }
int rename(const char *a, const char *b) { REAL(int, "rename", const char *, const char *); return hit(below(a)) ? -1 : real(a, b); }
int renameat2(int i, const char *a, int j, const char *b, unsigned f) { REAL(int, "renameat2", int, const char *, int, const char *, unsigned); return hit(below(a)) ? -1 : real(i, a, j, b, f); }
int ftruncate(int n, off_t s) { REAL(int, "ftruncate", int, off_t); return hit(ours(n)) ? -1 : real(n, s); }
int ftruncate64(int n, off64_t s) { REAL(int, "ftruncate64", int, off64_t); return hit(ours(n)) ? -1 : real(n, s); }
int posix_fallocate(int n, off_t o, off_t s) { REAL(int, "posix_fallocate", int, off_t, off_t); return hit(ours(n)) ? failure : real(n, o, s); }

/* Removing needs no room: it counts for a death, never for a full disk. */
int unlink(const char *p) { REAL(int, "unlink", const char *); if (!failure && hit(below(p))) return -1; return real(p); }
int unlinkat(int i, const char *p, int f) { REAL(int, "unlinkat", int, const char *, int); if (!failure && hit(at >= 0 && i != AT_FDCWD)) return -1; return real(i, p, f); }
int rmdir(const char *p) { REAL(int, "rmdir", const char *); if (!failure && hit(below(p))) return -1; return real(p); }

#define OPEN(name) \
    int name(const char *p, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t m = va_arg(rest, mode_t); va_end(rest); \
        REAL(int, #name, const char *, int, ...); \
        return hit((flags & O_CREAT) && below(p)) ? -1 : real(p, flags, m); \
    }
OPEN(open)
OPEN(open64)

FILE *fopen64(const char *p, const char *m) { REAL(FILE *, "fopen64", const char *, const char *); return hit(m[0] != 'r' && below(p)) ? NULL : real(p, m); }
FILE *fopen(const char *p, const char *m) { REAL(FILE *, "fopen", const char *, const char *); return hit(m[0] != 'r' && below(p)) ? NULL : real(p, m); }
size_t fwrite(const void *d, size_t s, size_t c, FILE *f) { REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *); return hit(ours(fileno(f))) ? 0 : real(d, s, c, f); }
