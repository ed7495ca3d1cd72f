/* Fails, kills or cuts short the n-th call of a kind: LD_PRELOAD=shim.so FAULTS=state. `worlds/faults.py` writes the state, a shared page.
 *
 * Calls on files count only below the state's root, so that imports, kernels and the terminal are left out. Allocations count from 1 MiB.
 * Every process that inherits LD_PRELOAD counts into the same page.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { WRITE, SYNC, RENAME, LINK, CREATE, TRUNCATE, REMOVE, MAP, ALLOCATE, CONNECT, SEND, RECEIVE, EXECUTE, KINDS };
enum mode { COUNT, FAIL, KILL, SHORT, TORN };

struct state {
    int armed, kind, mode, error;
    long n;
    _Atomic long counts[KINDS];
    _Atomic long fired;
    char root[PATH_MAX];
};

static struct state *state;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULTS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) state = page;
}

/* Count a call. Returns true if this is the one that fails; kills the process if the mode says so. */
static int hit(enum kind kind) {
    long n = atomic_fetch_add(&state->counts[kind], 1) + 1;
    if (state->mode == COUNT || state->kind != kind || state->n != n) return 0;
    atomic_store(&state->fired, 1);
    if (state->mode == KILL) kill(getpid(), SIGKILL);
    errno = state->error;
    return 1;
}

static int armed(void) { return state && state->armed; }

static int below_root(const char *path) {
    size_t length = strlen(state->root);
    return !strncmp(path, state->root, length) && (path[length] == '/' || !path[length]);
}

static int file_counts(int file) {
    char link[64], path[PATH_MAX];
    if (!armed()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below_root(path);
}

static int path_counts(int folder, const char *path) {
    char whole[2 * PATH_MAX];
    if (!armed() || !path) return 0;
    if (*path == '/') return below_root(path);
    if (folder != AT_FDCWD) return file_counts(folder);
    if (!getcwd(whole, PATH_MAX)) return 0;
    return below_root(whole);
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) {
    int before = errno;
    void *found = dlsym(RTLD_NEXT, name);
    errno = before;
    return found;
}

/* Some bytes of a write: all, half before an error or the end of the process, or -1 with errno. */
#define WRITING(type, name, parameters, file, size, half, ...)                                \
    type name parameters {                                                                    \
        if (file_counts(file) && hit(WRITE)) {                                                \
            if (state->mode == FAIL) return -1;                                               \
            type done = size > 1 ? REAL(name) half : -1;                                      \
            if (state->mode == TORN) kill(getpid(), SIGKILL);                                 \
            if (size > 1) return done;                                                        \
        }                                                                                     \
        return REAL(name)(__VA_ARGS__);                                                       \
    }

WRITING(ssize_t, write, (int f, const void *b, size_t n), f, n, (f, b, n / 2), f, b, n)
WRITING(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), f, n, (f, b, n / 2, o), f, b, n, o)
WRITING(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), f, n, (f, b, n / 2, o), f, b, n, o)
WRITING(ssize_t, writev, (int f, const struct iovec *v, int c), f, c, (f, v, c / 2), f, v, c)
WRITING(ssize_t, pwritev, (int f, const struct iovec *v, int c, off_t o), f, c, (f, v, c / 2, o), f, v, c, o)
WRITING(ssize_t, pwritev64, (int f, const struct iovec *v, int c, off64_t o), f, c, (f, v, c / 2, o), f, v, c, o)
WRITING(ssize_t, sendfile, (int f, int s, off_t *o, size_t n), f, n, (f, s, o, n / 2), f, s, o, n)
WRITING(ssize_t, sendfile64, (int f, int s, off64_t *o, size_t n), f, n, (f, s, o, n / 2), f, s, o, n)
WRITING(ssize_t, copy_file_range, (int s, off64_t *a, int f, off64_t *b, size_t n, unsigned g), f, n, (s, a, f, b, n / 2, g), s, a, f, b, n, g)

#define FAILING(kind, counts, type, name, parameters, ...)  \
    type name parameters {                                  \
        if (counts && hit(kind)) return -1;                 \
        return REAL(name)(__VA_ARGS__);                     \
    }

/* Nothing is flushed: flushing protects files from a power failure, which is no fault here, and takes most of a command's time. */
int fsync(int f) { return file_counts(f) && hit(SYNC) ? -1 : 0; }
int fdatasync(int f) { return fsync(f); }

FAILING(RENAME, path_counts(AT_FDCWD, b), int, rename, (const char *a, const char *b), a, b)
FAILING(RENAME, path_counts(e, b), int, renameat, (int d, const char *a, int e, const char *b), d, a, e, b)
FAILING(RENAME, path_counts(e, b), int, renameat2, (int d, const char *a, int e, const char *b, unsigned g), d, a, e, b, g)
FAILING(LINK, path_counts(AT_FDCWD, b), int, link, (const char *a, const char *b), a, b)
FAILING(LINK, path_counts(e, b), int, linkat, (int d, const char *a, int e, const char *b, int g), d, a, e, b, g)
FAILING(LINK, path_counts(AT_FDCWD, b), int, symlink, (const char *a, const char *b), a, b)
FAILING(LINK, path_counts(e, b), int, symlinkat, (const char *a, int e, const char *b), a, e, b)
FAILING(CREATE, path_counts(AT_FDCWD, p), int, mkdir, (const char *p, mode_t m), p, m)
FAILING(CREATE, path_counts(d, p), int, mkdirat, (int d, const char *p, mode_t m), d, p, m)
FAILING(TRUNCATE, file_counts(f), int, ftruncate, (int f, off_t n), f, n)
FAILING(TRUNCATE, file_counts(f), int, ftruncate64, (int f, off64_t n), f, n)
/* What does not exist is not refused. */
static int removed(int folder, const char *path) {
    struct stat found;
    int before = errno, counts = path_counts(folder, path) && !fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW);
    errno = before;
    return counts;
}

FAILING(REMOVE, removed(AT_FDCWD, p), int, unlink, (const char *p), p)
FAILING(REMOVE, removed(d, p), int, unlinkat, (int d, const char *p, int g), d, p, g)
FAILING(REMOVE, removed(AT_FDCWD, p), int, rmdir, (const char *p), p)
FAILING(CONNECT, armed(), int, connect, (int f, const struct sockaddr *a, socklen_t n), f, a, n)
/* A connection that fails is gone for both ends. */
#define CONNECTED(kind, name, parameters, file, ...)   \
    ssize_t name parameters {                          \
        if (armed() && hit(kind)) {                    \
            shutdown(file, SHUT_RDWR);                 \
            errno = state->error;                      \
            return -1;                                 \
        }                                              \
        return REAL(name)(__VA_ARGS__);                \
    }

CONNECTED(SEND, send, (int f, const void *b, size_t n, int g), f, f, b, n, g)
CONNECTED(RECEIVE, recv, (int f, void *b, size_t n, int g), f, f, b, n, g)
static int executed(const char *path) { return armed() && !access(path, X_OK); }
FAILING(EXECUTE, executed(p), int, execve, (const char *p, char *const a[], char *const e[]), p, a, e)
FAILING(EXECUTE, executed(p), int, execv, (const char *p, char *const a[]), p, a)

int posix_fallocate(int f, off_t o, off_t n) {
    if (file_counts(f) && hit(TRUNCATE)) return state->error;
    return REAL(posix_fallocate)(f, o, n);
}

int posix_fallocate64(int f, off64_t o, off64_t n) {
    if (file_counts(f) && hit(TRUNCATE)) return state->error;
    return REAL(posix_fallocate64)(f, o, n);
}

#define OPENING(name, parameters, folder, ...)                                     \
    int name parameters {                                                          \
        mode_t mode = 0;                                                           \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                 \
            va_list rest;                                                          \
            va_start(rest, flags);                                                 \
            mode = va_arg(rest, mode_t);                                           \
            va_end(rest);                                                          \
            if (path_counts(folder, path) && hit(CREATE)) return -1;               \
        }                                                                          \
        return REAL(name)(__VA_ARGS__, flags, mode);                               \
    }

OPENING(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPENING(openat, (int folder, const char *path, int flags, ...), folder, folder, path)
OPENING(openat64, (int folder, const char *path, int flags, ...), folder, folder, path)

#define MAPPING(name, offset)                                                                       \
    void *name(void *at, size_t size, int allowed, int flags, int file, offset start) {             \
        if (flags & MAP_ANONYMOUS ? armed() && size >= 1 << 20 && hit(ALLOCATE) : file_counts(file) && hit(MAP)) \
            return MAP_FAILED;                                                                      \
        return REAL(name)(at, size, allowed, flags, file, start);                                   \
    }

MAPPING(mmap, off_t)
MAPPING(mmap64, off64_t)

/* glibc's own names, because dlsym allocates. */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
static int refused(size_t size) { return size >= 1 << 20 && armed() && hit(ALLOCATE); }
void *malloc(size_t n) { return refused(n) ? NULL : __libc_malloc(n); }
void *calloc(size_t a, size_t b) { return refused(a * b) ? NULL : __libc_calloc(a, b); }
void *realloc(void *p, size_t n) { return refused(n) ? NULL : __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { return refused(n) ? NULL : __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { return refused(n) ? NULL : __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    if (refused(n)) return ENOMEM;
    *p = __libc_memalign(a, n);
    return *p ? 0 : ENOMEM;
}
