/* A CUDA runtime without a GPU: memory, streams, events, graphs and bookkeeping are kept, kernels are only counted.
 *
 * "Device" memory is zeroed host memory, mapped on demand, so that what is allocated but never touched costs nothing.
 * Everything is done at once, in the order of the calls: a stream is never behind. README.md says what can be set.
 */
#define _GNU_SOURCE
#include "fake.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------------------------ settings */

static struct {
    size_t total, context;
    int major, minor, sms, threads_per_sm, blocks_per_sm, event_lag, verbose, downward;
    int devices, driver, mig; /* the driver's version as CUDA writes it: 12.4 is 12040 */
    size_t shared_per_sm, shared_optin, l2;
    const char *report;
    char name[200];
} card;

struct model { int cc, sms, threads, blocks; size_t shared_kib, optin_kib, l2_mib; };
static const struct model MODELS[] = {
    {75, 40, 1024, 16, 64, 64, 4},    {80, 108, 2048, 32, 164, 163, 40}, {86, 28, 1536, 16, 100, 99, 3},
    {89, 24, 1536, 24, 100, 99, 24},  {90, 132, 2048, 32, 228, 227, 50}, {100, 148, 2048, 32, 228, 227, 126},
    {120, 36, 1536, 24, 100, 99, 32},
};

static size_t size_setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    if (!text || !*text) return otherwise;
    char *end;
    double value = strtod(text, &end);
    while (*end == ' ') end++;
    switch (*end) {
    case 'k': case 'K': value *= 1ull << 10; break;
    case 'm': case 'M': value *= 1ull << 20; break;
    case 'g': case 'G': value *= 1ull << 30; break;
    case 't': case 'T': value *= 1ull << 40; break;
    }
    return (size_t)value;
}

static long number_setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

static void write_report(void) {
    if (card.report) fakecuda_report(card.report);
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void read_settings(void) {
    card.total = size_setting("FAKE_CUDA_MEMORY", (size_t)8 << 30) / GRANULE * GRANULE;
    card.context = size_setting("FAKE_CUDA_CONTEXT", 0);
    card.event_lag = (int)number_setting("FAKE_CUDA_EVENT_LAG", 0);
    card.verbose = (int)number_setting("FAKE_CUDA_VERBOSE", 0);
    const char *addresses = getenv("FAKE_CUDA_ADDRESSES");
    card.downward = addresses && !strcmp(addresses, "down");
    const char *cc = getenv("FAKE_CUDA_CC");
    card.major = 8, card.minor = 6;
    if (cc && *cc && sscanf(cc, "%d.%d", &card.major, &card.minor) < 1) card.major = 8, card.minor = 6;
    const struct model *model = &MODELS[2];
    for (size_t i = 0; i < sizeof MODELS / sizeof *MODELS; i++)
        if (MODELS[i].cc <= card.major * 10 + card.minor) model = &MODELS[i];
    card.sms = (int)number_setting("FAKE_CUDA_SMS", model->sms);
    card.threads_per_sm = model->threads;
    card.blocks_per_sm = model->blocks;
    card.shared_per_sm = model->shared_kib << 10;
    card.shared_optin = model->optin_kib << 10;
    card.l2 = model->l2_mib << 20;
    card.devices = (int)number_setting("FAKE_CUDA_DEVICES", 1);
    card.mig = (int)number_setting("FAKE_CUDA_MIG", 0);
    const char *driver = getenv("FAKE_CUDA_DRIVER");
    int of_driver = 0, behind_point = 0;
    card.driver = CUDART_VERSION;
    if (driver && sscanf(driver, "%d.%d", &of_driver, &behind_point) > 0) card.driver = of_driver * 1000 + behind_point * 10;
    const char *name = getenv("FAKE_CUDA_NAME");
    const char *arithmetic = getenv("FAKE_CUDA_ARITHMETIC");
    const char *usual = arithmetic && !strcmp(arithmetic, "1") ? "fake CUDA" : "fake CUDA (no arithmetic)";
    snprintf(card.name, sizeof card.name, "%s", name && *name ? name : usual);
    card.report = getenv("FAKE_CUDA_REPORT");
    if (card.report) atexit(write_report);
    size_t host = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    if (card.total > host) { /* its memory is the host's: a model that fills it would end the machine */
        fprintf(stderr, "fake CUDA: expected FAKE_CUDA_MEMORY of at most the host's memory, %zu MiB, found %zu MiB\n",
                host >> 20, card.total >> 20);
        _exit(2);
    }
}
static void init(void) { pthread_once(&once, read_settings); }

size_t fakecuda_total(void) { init(); return card.total; }

/* ------------------------------------------------------------------ errors */

static __thread cudaError_t last_error;
static cudaError_t fail(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

struct error_text { int code; const char *name, *text; };
static const struct error_text ERRORS[] = {
#include "errors.inc" /* made by build.sh from the header: the names */
};
static const struct error_text TEXTS[] = {
    {cudaSuccess, 0, "no error"},
    {cudaErrorInvalidValue, 0, "invalid argument"},
    {cudaErrorMemoryAllocation, 0, "out of memory"},
    {cudaErrorInitializationError, 0, "initialization error"},
    {cudaErrorInvalidConfiguration, 0, "invalid configuration argument"},
    {cudaErrorNoDevice, 0, "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, 0, "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, 0, "invalid resource handle"},
    {cudaErrorNotReady, 0, "device not ready"},
    {cudaErrorNotSupported, 0, "operation not supported"},
    {cudaErrorHostMemoryAlreadyRegistered, 0, "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, 0, "pointer does not correspond to a registered memory region"},
    {cudaErrorStreamCaptureUnsupported, 0, "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, 0, "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureImplicit, 0, "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorIllegalState, 0, "the operation cannot be performed in the present state"},
};

const char *cudaGetErrorName(cudaError_t error) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == (int)error) return ERRORS[i].name;
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
        if (TEXTS[i].code == (int)error) return TEXTS[i].text;
    return cudaGetErrorName(error);
}

/* ------------------------------------------------------------------ counters */

static long long counters[N_COUNTERS];
static const char *const COUNTER_NAMES[N_COUNTERS] = {
    "launches", "library_calls", "graph_launches", "captured_nodes", "mallocs", "frees", "ooms", "host_allocs",
    "host_frees", "streams", "events", "syncs", "memsets", "stubs", "graph_kernels",
    "h2d", "d2h", "d2d", "h2h", "h2d_bytes", "d2h_bytes", "d2d_bytes", "h2h_bytes", "h2d_pinned_bytes",
    "d2h_pinned_bytes", "device_bytes", "device_peak_bytes", "host_bytes", "host_peak_bytes",
};
void fakecuda_count(enum counter which, long long by) { __atomic_add_fetch(&counters[which], by, __ATOMIC_RELAXED); }

long long fakecuda_get(const char *name) {
    for (int i = 0; i < N_COUNTERS; i++)
        if (!strcmp(name, COUNTER_NAMES[i])) return __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
    return -1;
}

/* ------------------------------------------------------------------ kernels, by the address of their host function */

struct kernel { const void *host; const char *name; long long launches; size_t shared_limit; struct kernel *next; };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over all that follows */
static struct kernel **buckets;
static size_t n_buckets, n_kernels;

static size_t hash(const void *pointer) { return ((uintptr_t)pointer >> 4) * 0x9E3779B97F4A7C15ull >> 20; }

static struct kernel *find_kernel(const void *host, const char *name) { /* under the lock; made if not there */
    if (n_kernels >= n_buckets) {
        size_t wider = n_buckets ? n_buckets * 4 : 1 << 14;
        struct kernel **fresh = calloc(wider, sizeof *fresh);
        for (size_t i = 0; i < n_buckets; i++)
            for (struct kernel *k = buckets[i], *next; k; k = next) {
                next = k->next;
                k->next = fresh[hash(k->host) % wider];
                fresh[hash(k->host) % wider] = k;
            }
        free(buckets);
        buckets = fresh, n_buckets = wider;
    }
    struct kernel **slot = &buckets[hash(host) % n_buckets];
    for (struct kernel *k = *slot; k; k = k->next)
        if (k->host == host) {
            if (!k->name) k->name = name;
            return k;
        }
    struct kernel *k = calloc(1, sizeof *k);
    *k = (struct kernel){.host = host, .name = name, .shared_limit = 48 << 10, .next = *slot};
    *slot = k;
    n_kernels++;
    return k;
}

struct named { char *name; struct kernel *kernel; struct named *next; };
static struct named *names; /* of cuBLAS' calls, of modules loaded at run time: few */
void *fakecuda_kernel_named(const char *name) {
    pthread_mutex_lock(&lock);
    struct named *n = names;
    while (n && strcmp(n->name, name)) n = n->next;
    if (!n) {
        n = calloc(1, sizeof *n);
        n->name = strdup(name);
        n->kernel = find_kernel(n, n->name);
        n->next = names;
        names = n;
    }
    pthread_mutex_unlock(&lock);
    return n->kernel;
}

void fakecuda_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < N_COUNTERS; i++)
        if (i != B_DEVICE && i != B_HOST) counters[i] = 0;
    counters[B_DEVICE_PEAK] = counters[B_DEVICE];
    counters[B_HOST_PEAK] = counters[B_HOST];
    for (size_t i = 0; i < n_buckets; i++)
        for (struct kernel *k = buckets[i]; k; k = k->next) k->launches = 0;
    pthread_mutex_unlock(&lock);
}

static int by_launches(const void *a, const void *b) {
    long long x = (*(struct kernel *const *)a)->launches, y = (*(struct kernel *const *)b)->launches;
    return (x < y) - (x > y);
}

int fakecuda_report(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < N_COUNTERS; i++) fprintf(file, "%lld\t%s\n", counters[i], COUNTER_NAMES[i]);
    struct kernel **found = malloc((n_kernels + 1) * sizeof *found);
    size_t n = 0;
    for (size_t i = 0; i < n_buckets; i++)
        for (struct kernel *k = buckets[i]; k; k = k->next)
            if (k->launches) found[n++] = k;
    pthread_mutex_unlock(&lock);
    qsort(found, n, sizeof *found, by_launches);
    for (size_t i = 0; i < n; i++) fprintf(file, "%lld\tkernel %s\n", found[i]->launches, found[i]->name ? found[i]->name : "?");
    free(found);
    return fclose(file);
}

void fakecuda_stub(const char *library, const char *symbol) {
    init();
    fakecuda_count(N_STUB, 1);
    if (card.verbose) fprintf(stderr, "fake CUDA: %s of %s is not written\n", symbol, library);
    char text[300];
    snprintf(text, sizeof text, "stub %s", symbol);
    struct kernel *k = fakecuda_kernel_named(text);
    __atomic_add_fetch(&k->launches, 1, __ATOMIC_RELAXED);
}

/* ------------------------------------------------------------------ regions: sorted by address */

static struct region *regions;
static size_t n_regions, room;
static size_t used; /* of the card, without the context */

static size_t place(uintptr_t address) { /* index of the first region beyond the address */
    size_t low = 0, high = n_regions;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (regions[middle].base <= address) low = middle + 1; else high = middle;
    }
    return low;
}

static struct region *region_at(uintptr_t address) { /* under the lock */
    size_t i = place(address);
    if (!i) return NULL;
    struct region *r = &regions[i - 1];
    return address < r->base + (r->size ? r->size : 1) ? r : NULL;
}

int fakecuda_region_add(uintptr_t base, size_t size, size_t mapped, int kind) {
    pthread_mutex_lock(&lock);
    if (n_regions == room) regions = realloc(regions, (room = room ? room * 2 : 256) * sizeof *regions);
    size_t i = place(base);
    memmove(regions + i + 1, regions + i, (n_regions - i) * sizeof *regions);
    regions[i] = (struct region){base, size, mapped, kind};
    n_regions++;
    pthread_mutex_unlock(&lock);
    return 0;
}

int fakecuda_region_remove(uintptr_t base, int kind, struct region *out) {
    pthread_mutex_lock(&lock);
    size_t i = place(base);
    struct region *r = i && regions[i - 1].base == base && regions[i - 1].kind == kind ? &regions[i - 1] : NULL;
    if (r) {
        if (out) *out = *r;
        memmove(r, r + 1, (n_regions - i) * sizeof *r);
        n_regions--;
    }
    pthread_mutex_unlock(&lock);
    return r ? 0 : -1;
}

int fakecuda_region_find(uintptr_t address, struct region *out) {
    pthread_mutex_lock(&lock);
    struct region *r = region_at(address);
    if (r && out) *out = *r;
    pthread_mutex_unlock(&lock);
    return r ? 0 : -1;
}

static void raise_peak(enum counter now, enum counter peak, long long by) {
    long long value = __atomic_add_fetch(&counters[now], by, __ATOMIC_RELAXED);
    if (value > counters[peak]) counters[peak] = value;
}

cudaError_t fakecuda_take(size_t bytes) {
    init();
    pthread_mutex_lock(&lock);
    bool fits = used + bytes + card.context <= card.total;
    if (fits) {
        used += bytes;
        raise_peak(B_DEVICE, B_DEVICE_PEAK, (long long)bytes);
    }
    pthread_mutex_unlock(&lock);
    fakecuda_count(fits ? N_MALLOC : N_OOM, 1);
    return fits ? cudaSuccess : cudaErrorMemoryAllocation;
}

void fakecuda_give(size_t bytes) {
    pthread_mutex_lock(&lock);
    used -= bytes;
    counters[B_DEVICE] -= (long long)bytes;
    pthread_mutex_unlock(&lock);
    fakecuda_count(N_FREE, 1);
}

size_t fakecuda_used(void) {
    init();
    pthread_mutex_lock(&lock);
    size_t found = used + card.context;
    pthread_mutex_unlock(&lock);
    return found;
}

/* ------------------------------------------------------------------ streams, events, captures, graphs */

enum node_kind { G_KERNEL, G_COPY, G_SET, G_HOST, G_EMPTY };
struct node { int kind; struct kernel *kernel; void *to; const void *from; size_t bytes; int value; cudaHostFn_t call; };
struct user { void *pointer; cudaHostFn_t destroy; int references; };
struct graph { struct node *nodes; size_t n, room; struct user **users; size_t n_users; const void *tip; int references; };
struct capture { unsigned long long id; struct graph *graph; bool valid; int mode, members; pthread_t thread; struct stream *origin; };
struct stream { unsigned magic; unsigned flags; int priority; unsigned long long id; struct capture *capture; struct stream *next; };
struct event { unsigned magic; unsigned flags; bool recorded; int lag; struct timespec at; struct capture *capture; unsigned long long capture_id; };
enum { STREAM = 0x57726561, EVENT = 0x45766e74 };

static struct stream legacy = {.magic = STREAM}, per_thread = {.magic = STREAM, .id = 1};
static struct stream *streams; /* those made, to end a capture in all of them */
static unsigned long long stream_ids = 1, capture_ids;
static int captures; /* running */
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static struct stream *stream_of(cudaStream_t s) {
    if (!s || s == cudaStreamLegacy) return &legacy;
    if (s == cudaStreamPerThread) return &per_thread;
    struct stream *found = (struct stream *)s;
    return found->magic == STREAM ? found : NULL;
}

/* A call that is not allowed while a capture runs spoils the capture, as CUDA's own does. */
static cudaError_t unsafe(void) {
    if (!captures || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    cudaError_t found = cudaSuccess;
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next)
        if (s->capture && s->capture->origin == s) {
            bool mine = pthread_equal(s->capture->thread, pthread_self());
            bool all = s->capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
            if (all || (mine && s->capture->mode != cudaStreamCaptureModeRelaxed)) {
                s->capture->valid = false;
                found = cudaErrorStreamCaptureUnsupported;
            }
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static cudaError_t add_node(struct stream *s, struct node node) { /* if s captures; success too when it does not */
    struct capture *c = s->capture;
    if (!c->valid) return cudaErrorStreamCaptureInvalidated;
    pthread_mutex_lock(&lock);
    struct graph *g = c->graph;
    if (g->n == g->room) g->nodes = realloc(g->nodes, (g->room = g->room ? g->room * 2 : 64) * sizeof *g->nodes);
    g->nodes[g->n++] = node;
    g->tip = (const void *)(uintptr_t)g->n; /* a node's handle is its number */
    pthread_mutex_unlock(&lock);
    fakecuda_count(N_CAPTURED, 1);
    return cudaSuccess;
}

static cudaError_t run_kernel(struct kernel *kernel, cudaStream_t stream, enum counter which) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture) return fail(add_node(s, (struct node){.kind = G_KERNEL, .kernel = kernel}));
    fakecuda_count(which, 1);
    __atomic_add_fetch(&kernel->launches, 1, __ATOMIC_RELAXED);
    return cudaSuccess;
}

cudaError_t fakecuda_launch(void *handle, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, void **args) {
    (void)args;
    init();
    struct kernel *kernel = handle;
    unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
    if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
    if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || block.z > 64) return fail(cudaErrorInvalidConfiguration);
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return fail(cudaErrorInvalidConfiguration);
    if (shared > kernel->shared_limit) return fail(cudaErrorInvalidValue);
    return run_kernel(kernel, stream, N_LAUNCH);
}

cudaError_t fakecuda_library_call(const char *symbol, cudaStream_t stream) {
    init();
    return run_kernel(fakecuda_kernel_named(symbol), stream, N_LIBRARY);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
    init();
    struct stream *s = calloc(1, sizeof *s);
    pthread_mutex_lock(&lock);
    *s = (struct stream){.magic = STREAM, .flags = flags, .priority = priority, .id = ++stream_ids, .next = streams};
    streams = s;
    pthread_mutex_unlock(&lock);
    *out = (cudaStream_t)s;
    fakecuda_count(N_STREAM, 1);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    struct stream *s = stream_of(stream);
    if (!s || s == &legacy || s == &per_thread) return fail(cudaErrorInvalidResourceHandle);
    pthread_mutex_lock(&lock);
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == s) { *at = s->next; break; }
    pthread_mutex_unlock(&lock);
    s->magic = 0;
    free(s);
    return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *out) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    *out = s->flags;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *out) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    *out = s->priority;
    return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *out) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    *out = s->id;
    return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *out) { (void)stream; *out = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

static cudaError_t wait_for(cudaStream_t stream) {
    init();
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture) { s->capture->valid = false; return fail(cudaErrorStreamCaptureUnsupported); }
    return cudaSuccess;
}
static unsigned long long sync_age; /* grows when everything is waited for */
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    fakecuda_count(N_SYNC, 1);
    __atomic_add_fetch(&sync_age, 1, __ATOMIC_RELAXED);
    return wait_for(stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for(stream); }
cudaError_t cudaDeviceSynchronize(void) {
    init();
    fakecuda_count(N_SYNC, 1);
    __atomic_add_fetch(&sync_age, 1, __ATOMIC_RELAXED);
    return fail(unsafe());
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture) return fail(add_node(s, (struct node){.kind = G_HOST, .call = call, .to = data}));
    call(data);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    (void)flags;
    cudaError_t error = wait_for(stream);
    if (error == cudaSuccess) call(stream, cudaSuccess, data);
    return error;
}

/* Events: the time of the record, and the capture it was made in. With FAKE_CUDA_EVENT_LAG=n the first n queries after a
 * record say "not ready" (unless something was waited for meanwhile), as on a card that is behind. */
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    init();
    struct event *e = calloc(1, sizeof *e);
    *e = (struct event){.magic = EVENT, .flags = flags};
    *out = (cudaEvent_t)e;
    fakecuda_count(N_EVENT, 1);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }

static struct event *event_of(cudaEvent_t event) {
    struct event *e = (struct event *)event;
    return e && e->magic == EVENT ? e : NULL;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    struct event *e = event_of(event);
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    e->magic = 0;
    free(e);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    struct event *e = event_of(event);
    struct stream *s = stream_of(stream);
    if (!e || !s) return fail(cudaErrorInvalidResourceHandle);
    e->recorded = true;
    e->lag = card.event_lag;
    clock_gettime(CLOCK_MONOTONIC, &e->at);
    e->capture = s->capture;
    if (s->capture) {
        e->capture_id = s->capture->id;
        if (flags & cudaEventRecordExternal) return fail(add_node(s, (struct node){.kind = G_EMPTY}));
    }
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

static bool captured(struct event *e) { /* recorded in a capture that still runs */
    if (!e->capture) return false;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) found |= s->capture == e->capture && s->capture->id == e->capture_id;
    pthread_mutex_unlock(&lock);
    if (!found) e->capture = NULL;
    return found;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    struct event *e = event_of(event);
    struct stream *s = stream_of(stream);
    if (!e || !s) return fail(cudaErrorInvalidResourceHandle);
    if (captured(e)) {
        if (s == &legacy) { e->capture->valid = false; return fail(cudaErrorStreamCaptureImplicit); }
        if (s->capture && s->capture != e->capture) {
            s->capture->valid = e->capture->valid = false;
            return fail(cudaErrorStreamCaptureMerge);
        }
        if (!s->capture) { s->capture = e->capture; s->capture->members++; }
    } else if (s->capture && e->recorded && !(flags & cudaEventWaitExternal)) {
        s->capture->valid = false;
        return fail(cudaErrorStreamCaptureIsolation);
    }
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    struct event *e = event_of(event);
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    if (captured(e)) return fail(cudaErrorCapturedEvent);
    cudaError_t error = unsafe();
    if (error) return fail(error);
    if (e->recorded && e->lag > 0) {
        e->lag--;
        return fail(cudaErrorNotReady);
    }
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    struct event *e = event_of(event);
    if (!e) return fail(cudaErrorInvalidResourceHandle);
    if (captured(e)) return fail(cudaErrorCapturedEvent);
    e->lag = 0;
    fakecuda_count(N_SYNC, 1);
    return fail(unsafe());
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    struct event *a = event_of(start), *b = event_of(end);
    if (!a || !b || !a->recorded || !b->recorded || (a->flags | b->flags) & cudaEventDisableTiming)
        return fail(cudaErrorInvalidResourceHandle);
    if (a->lag > 0 || b->lag > 0) return fail(cudaErrorNotReady);
    *ms = (float)((double)(b->at.tv_sec - a->at.tv_sec) * 1e3 + (double)(b->at.tv_nsec - a->at.tv_nsec) * 1e-6);
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode old = thread_mode;
    thread_mode = *mode;
    *mode = old;
    return cudaSuccess;
}

static cudaError_t begin_capture(cudaStream_t stream, struct graph *graph, enum cudaStreamCaptureMode mode) {
    init();
    struct stream *s = stream_of(stream);
    if (!s || s->capture) return fail(s ? cudaErrorIllegalState : cudaErrorInvalidResourceHandle);
    if (s == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
    struct capture *c = calloc(1, sizeof *c);
    if (!graph) { graph = calloc(1, sizeof *graph); graph->references = 1; }
    pthread_mutex_lock(&lock);
    *c = (struct capture){.id = ++capture_ids, .graph = graph, .valid = true, .mode = mode, .members = 1,
                          .thread = pthread_self(), .origin = s};
    s->capture = c;
    captures++;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { return begin_capture(stream, NULL, mode); }
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *dependencies,
                                          const cudaGraphEdgeData *data, size_t n, enum cudaStreamCaptureMode mode) {
    (void)dependencies, (void)data, (void)n;
    return begin_capture(stream, (struct graph *)graph, mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    struct stream *s = stream_of(stream);
    if (!s || !s->capture) return fail(s ? cudaErrorIllegalState : cudaErrorInvalidResourceHandle);
    struct capture *c = s->capture;
    if (c->origin != s) return fail(cudaErrorStreamCaptureUnmatched);
    if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
        return fail(cudaErrorStreamCaptureWrongThread);
    pthread_mutex_lock(&lock);
    for (struct stream *other = streams; other; other = other->next)
        if (other->capture == c) other->capture = NULL;
    per_thread.capture = per_thread.capture == c ? NULL : per_thread.capture;
    captures--;
    pthread_mutex_unlock(&lock);
    bool valid = c->valid;
    *out = valid ? (cudaGraph_t)c->graph : NULL;
    if (!valid) cudaGraphDestroy((cudaGraph_t)c->graph);
    free(c);
    return fail(valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out) {
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    *out = !s->capture ? cudaStreamCaptureStatusNone
           : s->capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *n) {
    cudaError_t error = cudaStreamIsCapturing(stream, status);
    struct stream *s = stream_of(stream);
    if (error || !s->capture) return error;
    struct graph *g = s->capture->graph;
    if (id) *id = s->capture->id;
    if (graph) *graph = (cudaGraph_t)g;
    if (dependencies) *dependencies = (const cudaGraphNode_t *)&g->tip;
    if (edges) *edges = NULL;
    if (n) *n = g->n ? 1 : 0;
    return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies,
                                                const cudaGraphEdgeData *data, size_t n, unsigned flags) {
    (void)stream, (void)dependencies, (void)data, (void)n, (void)flags;
    return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t *out, unsigned flags) {
    (void)flags;
    struct graph *g = calloc(1, sizeof *g);
    g->references = 1;
    *out = (cudaGraph_t)g;
    return cudaSuccess;
}
static void drop(struct graph *g) {
    if (--g->references > 0) return;
    for (size_t i = 0; i < g->n_users; i++) cudaUserObjectRelease((cudaUserObject_t)g->users[i], 1);
    free(g->users);
    free(g->nodes);
    free(g);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    if (!graph) return fail(cudaErrorInvalidValue);
    drop((struct graph *)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
    struct graph *g = (struct graph *)graph;
    if (!nodes) { *n = g->n; return cudaSuccess; }
    for (size_t i = 0; i < *n; i++) nodes[i] = i < g->n ? (cudaGraphNode_t)(uintptr_t)(i + 1) : NULL;
    if (*n > g->n) *n = g->n;
    return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) {
    (void)flags;
    struct graph *g = (struct graph *)graph;
    FILE *file = fopen(path, "w");
    if (!file) return fail(cudaErrorInvalidValue);
    fputs("digraph {\n", file);
    for (size_t i = 0; i < g->n; i++)
        fprintf(file, "n%zu [label=\"%s\"];\n", i, g->nodes[i].kernel && g->nodes[i].kernel->name ? g->nodes[i].kernel->name : "copy");
    fputs("}\n", file);
    fclose(file);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    struct graph *g = (struct graph *)graph;
    if (!g) return fail(cudaErrorInvalidValue);
    cudaError_t error = unsafe();
    if (error) return fail(error);
    struct graph *copy = calloc(1, sizeof *copy);
    copy->n = g->n;
    copy->nodes = malloc(g->n * sizeof *copy->nodes + 1);
    memcpy(copy->nodes, g->nodes, g->n * sizeof *copy->nodes);
    copy->users = malloc(g->n_users * sizeof *copy->users + 1);
    for (copy->n_users = 0; copy->n_users < g->n_users; copy->n_users++) {
        copy->users[copy->n_users] = g->users[copy->n_users];
        g->users[copy->n_users]->references++;
    }
    copy->references = 1;
    *out = (cudaGraphExec_t)copy;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    if (!exec) return fail(cudaErrorInvalidValue);
    drop((struct graph *)exec);
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) { (void)exec, (void)stream; return cudaSuccess; }

static cudaError_t do_copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, bool really);
static cudaError_t do_set(void *to, int value, size_t bytes, bool really);

static int graph_copies = 1;
void fakecuda_graph_copies(int on) { graph_copies = on; } /* off: a graph's are counted; who does its kernels does them */

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    struct graph *g = (struct graph *)exec;
    struct stream *s = stream_of(stream);
    if (!g || !s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture) return fail(add_node(s, (struct node){.kind = G_EMPTY}));
    fakecuda_count(N_GRAPH_LAUNCH, 1);
    for (size_t i = 0; i < g->n; i++) {
        struct node *node = &g->nodes[i];
        cudaError_t error = cudaSuccess;
        switch (node->kind) {
        case G_KERNEL:
            fakecuda_count(N_LAUNCH, 1);
            fakecuda_count(N_GRAPH_KERNEL, 1);
            __atomic_add_fetch(&node->kernel->launches, 1, __ATOMIC_RELAXED);
            break;
        case G_COPY:
            error = do_copy(node->to, node->from, node->bytes, (enum cudaMemcpyKind)node->value, graph_copies);
            break;
        case G_SET: error = do_set(node->to, node->value, node->bytes, graph_copies); break;
        case G_HOST: node->call(node->to); break;
        }
        if (error) return fail(error);
    }
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *out, void *pointer, cudaHostFn_t destroy, unsigned n, unsigned flags) {
    (void)flags;
    struct user *u = calloc(1, sizeof *u);
    *u = (struct user){pointer, destroy, (int)n};
    *out = (cudaUserObject_t)u;
    return cudaSuccess;
}
cudaError_t cudaUserObjectRetain(cudaUserObject_t object, unsigned n) { ((struct user *)object)->references += (int)n; return cudaSuccess; }
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned n) {
    struct user *u = (struct user *)object;
    if ((u->references -= (int)n) > 0) return cudaSuccess;
    u->destroy(u->pointer);
    free(u);
    return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned n, unsigned flags) {
    struct graph *g = (struct graph *)graph;
    struct user *u = (struct user *)object;
    if (!(flags & cudaGraphUserObjectMove)) u->references += (int)n;
    for (; n; n--) {
        g->users = realloc(g->users, (g->n_users + 1) * sizeof *g->users);
        g->users[g->n_users++] = u;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphReleaseUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned n) {
    (void)graph;
    return cudaUserObjectRelease(object, n);
}

/* ------------------------------------------------------------------ memory */

static void *map(size_t bytes) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

/* Addresses of device memory come from one reserved range: the lowest gap that is wide enough, as a card's mostly are, or
 * with FAKE_CUDA_ADDRESSES=down the highest one, to see who relies on that. */
struct span { char *at; size_t bytes; struct span *next; };
static struct span *gaps; /* sorted by address, no two adjacent */
static pthread_mutex_t range_lock = PTHREAD_MUTEX_INITIALIZER;

static void reserve_range(void) {
    size_t bytes = card.total * 2 + GRANULE * 2;
    char *whole = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) return;
    char *start = (char *)(((uintptr_t)whole + GRANULE - 1) / GRANULE * GRANULE);
    gaps = malloc(sizeof *gaps);
    *gaps = (struct span){start, (bytes - (size_t)(start - whole)) / GRANULE * GRANULE, NULL};
}

static void *map_device(size_t bytes) {
    static pthread_once_t reserved = PTHREAD_ONCE_INIT;
    pthread_once(&reserved, reserve_range);
    pthread_mutex_lock(&range_lock);
    struct span **found = NULL;
    for (struct span **g = &gaps; *g; g = &(*g)->next)
        if ((*g)->bytes >= bytes) {
            found = g;
            if (!card.downward) break;
        }
    char *memory = NULL;
    if (found) {
        struct span *g = *found;
        memory = card.downward ? g->at + g->bytes - bytes : g->at;
        if (!card.downward) g->at += bytes;
        if (!(g->bytes -= bytes)) {
            *found = g->next;
            free(g);
        }
        if (mprotect(memory, bytes, PROT_READ | PROT_WRITE)) memory = NULL;
    }
    pthread_mutex_unlock(&range_lock);
    return memory;
}

static void unmap_device(char *memory, size_t bytes) { /* the pages go, the addresses stay ours, without access */
    pthread_mutex_lock(&range_lock);
    mmap(memory, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    struct span *before = NULL, *after = gaps;
    while (after && after->at < memory) before = after, after = after->next;
    struct span *gap = malloc(sizeof *gap);
    *gap = (struct span){memory, bytes, after};
    if (before) before->next = gap; else gaps = gap;
    if (after && memory + bytes == after->at) {
        gap->bytes += after->bytes;
        gap->next = after->next;
        free(after);
    }
    if (before && before->at + before->bytes == memory) {
        before->bytes += gap->bytes;
        before->next = gap->next;
        free(gap);
    }
    pthread_mutex_unlock(&range_lock);
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    init();
    if (!out) return fail(cudaErrorInvalidValue);
    cudaError_t error = unsafe();
    if (error) return fail(error);
    *out = NULL;
    if (!bytes) return cudaSuccess;
    if (bytes > card.total) { fakecuda_count(N_OOM, 1); return fail(cudaErrorMemoryAllocation); }
    size_t whole = (bytes + GRANULE - 1) / GRANULE * GRANULE;
    if (fakecuda_take(whole)) return fail(cudaErrorMemoryAllocation);
    void *memory = map_device(whole);
    if (!memory) { fakecuda_give(whole); return fail(cudaErrorMemoryAllocation); }
    fakecuda_region_add((uintptr_t)memory, bytes, whole, R_DEVICE);
    *out = memory;
    return cudaSuccess;
}
cudaError_t cudaFree(void *pointer) {
    init();
    if (!pointer) return cudaSuccess;
    cudaError_t error = unsafe();
    if (error) return fail(error);
    struct region r;
    if (fakecuda_region_remove((uintptr_t)pointer, R_DEVICE, &r)) return fail(cudaErrorInvalidValue);
    unmap_device(pointer, r.mapped);
    fakecuda_give(r.mapped);
    return cudaSuccess;
}
cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags) { (void)flags; return cudaMalloc(out, bytes); }
cudaError_t cudaMallocPitch(void **out, size_t *pitch, size_t width, size_t height) {
    *pitch = (width + 511) / 512 * 512;
    return cudaMalloc(out, *pitch * height);
}
static cudaError_t malloc_ordered(void **out, size_t bytes, cudaStream_t stream) {
    if (!stream_of(stream)) return fail(cudaErrorInvalidResourceHandle);
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaError_t error = cudaMalloc(out, bytes);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
}
cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t stream) { return malloc_ordered(out, bytes, stream); }
cudaError_t cudaMallocFromPoolAsync(void **out, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
    (void)pool;
    return malloc_ordered(out, bytes, stream);
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) {
    (void)stream;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaError_t error = cudaFree(pointer);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    size_t taken = fakecuda_used();
    if (free_bytes) *free_bytes = card.total > taken ? card.total - taken : 0;
    if (total) *total = card.total;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    init();
    cudaError_t error = unsafe();
    if (error) return fail(error);
    *out = NULL;
    if (!bytes) return cudaSuccess;
    size_t whole = (bytes + 4095) / 4096 * 4096;
    void *memory = map(whole);
    if (!memory) return fail(cudaErrorMemoryAllocation);
    fakecuda_region_add((uintptr_t)memory, bytes, whole, R_HOST);
    fakecuda_count(N_HOST_ALLOC, 1);
    raise_peak(B_HOST, B_HOST_PEAK, (long long)bytes);
    *out = memory;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **out, size_t bytes) { return cudaHostAlloc(out, bytes, 0); }
cudaError_t cudaFreeHost(void *pointer) {
    init();
    if (!pointer) return cudaSuccess;
    struct region r;
    if (fakecuda_region_remove((uintptr_t)pointer, R_HOST, &r)) return fail(cudaErrorInvalidValue);
    munmap(pointer, r.mapped);
    fakecuda_count(N_HOST_FREE, 1);
    fakecuda_count(B_HOST, -(long long)r.size);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    (void)flags;
    init();
    if (!pointer || !bytes) return fail(cudaErrorInvalidValue);
    struct region r;
    if (!fakecuda_region_find((uintptr_t)pointer, &r) || !fakecuda_region_find((uintptr_t)pointer + bytes - 1, &r))
        return fail(cudaErrorHostMemoryAlreadyRegistered);
    fakecuda_region_add((uintptr_t)pointer, bytes, 0, R_REGISTERED);
    raise_peak(B_HOST, B_HOST_PEAK, (long long)bytes);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
    struct region r;
    if (fakecuda_region_remove((uintptr_t)pointer, R_REGISTERED, &r)) return fail(cudaErrorHostMemoryNotRegistered);
    fakecuda_count(B_HOST, -(long long)r.size);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned flags) { (void)flags; *out = host; return cudaSuccess; }
cudaError_t cudaHostGetFlags(unsigned *out, void *host) { (void)host; *out = 0; return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
    init();
    memset(out, 0, sizeof *out);
    struct region r;
    if (fakecuda_region_find((uintptr_t)pointer, &r)) {
        out->type = cudaMemoryTypeUnregistered;
        out->device = -2; /* cudaInvalidDeviceId */
        out->hostPointer = (void *)pointer;
        return cudaSuccess;
    }
    out->type = r.kind == R_HOST || r.kind == R_REGISTERED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    out->devicePointer = (void *)pointer;
    out->hostPointer = out->type == cudaMemoryTypeHost ? (void *)pointer : NULL;
    return cudaSuccess;
}

enum side { OUTSIDE, PINNED, DEVICE, BEYOND }; /* BEYOND: begins on the card, ends past its allocation */
static enum side side_of(const void *pointer, size_t bytes) {
    struct region r;
    if (fakecuda_region_find((uintptr_t)pointer, &r)) return OUTSIDE;
    if (r.kind == R_HOST || r.kind == R_REGISTERED) return PINNED;
    uintptr_t end = (uintptr_t)pointer + bytes;
    while (end > r.base + r.size) { /* pages of an expandable segment lie side by side, each a region of its own */
        bool page = !r.mapped;
        if (!page || fakecuda_region_find(r.base + r.size, &r) || r.kind != R_DEVICE || r.mapped) return BEYOND;
    }
    return DEVICE;
}

static cudaError_t do_copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, bool really) {
    if (!bytes) return cudaSuccess;
    enum side target = side_of(to, bytes), source = side_of(from, bytes);
    if (target == BEYOND || source == BEYOND) return cudaErrorInvalidValue;
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) && target == OUTSIDE) return cudaErrorInvalidValue;
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) && source == OUTSIDE) return cudaErrorInvalidValue;
    if (really) memmove(to, from, bytes);
    bool there = target == DEVICE, here = source == DEVICE;
    enum counter n = here ? (there ? N_D2D : N_D2H) : (there ? N_H2D : N_H2H);
    fakecuda_count(n, 1);
    fakecuda_count((enum counter)(n + (B_H2D - N_H2D)), (long long)bytes);
    if (n == N_H2D && source == PINNED) fakecuda_count(B_H2D_PINNED, (long long)bytes);
    if (n == N_D2H && target == PINNED) fakecuda_count(B_D2H_PINNED, (long long)bytes);
    return cudaSuccess;
}
static cudaError_t do_set(void *to, int value, size_t bytes, bool really) {
    if (!bytes) return cudaSuccess;
    if (side_of(to, bytes) == BEYOND || side_of(to, bytes) == OUTSIDE) return cudaErrorInvalidValue;
    struct region r;
    fakecuda_region_find((uintptr_t)to, &r);
    if (really) memset(to, value, bytes);
    fakecuda_count(N_MEMSET, 1);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    init();
    fakecuda_count(N_SYNC, 1);
    cudaError_t error = unsafe();
    return fail(error ? error : do_copy(to, from, bytes, kind, true));
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    init();
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture)
        return fail(add_node(s, (struct node){.kind = G_COPY, .to = to, .from = from, .bytes = bytes, .value = (int)kind}));
    return fail(do_copy(to, from, bytes, kind, true));
}
cudaError_t cudaMemcpyPeer(void *to, int a, const void *from, int b, size_t bytes) {
    (void)a, (void)b;
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) {
    (void)a, (void)b;
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && !error; row++)
        error = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
    return error;
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         enum cudaMemcpyKind kind) {
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, NULL);
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    init();
    cudaError_t error = unsafe();
    return fail(error ? error : do_set(to, value, bytes, true));
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    init();
    struct stream *s = stream_of(stream);
    if (!s) return fail(cudaErrorInvalidResourceHandle);
    if (s->capture) return fail(add_node(s, (struct node){.kind = G_SET, .to = to, .bytes = bytes, .value = value}));
    return fail(do_set(to, value, bytes, true));
}
cudaError_t cudaMemPrefetchAsync(const void *p, size_t n, struct cudaMemLocation where, unsigned flags, cudaStream_t s) {
    (void)p, (void)n, (void)where, (void)flags, (void)s;
    return cudaSuccess;
}

/* One pool for cudaMallocAsync, without a cache of its own. */
static int the_pool;
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int device) { (void)device; *out = (cudaMemPool_t)&the_pool; return cudaSuccess; }
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *out, int device) { return cudaDeviceGetDefaultMemPool(out, device); }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { (void)p, (void)a, (void)v; return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr attribute, void *value) {
    (void)p;
    if (attribute == cudaMemPoolAttrReservedMemCurrent || attribute == cudaMemPoolAttrUsedMemCurrent)
        *(uint64_t *)value = (uint64_t)counters[B_DEVICE];
    else if (attribute == cudaMemPoolAttrReservedMemHigh || attribute == cudaMemPoolAttrUsedMemHigh)
        *(uint64_t *)value = (uint64_t)counters[B_DEVICE_PEAK];
    else if (attribute == cudaMemPoolAttrReleaseThreshold)
        *(uint64_t *)value = 0;
    else
        *(int *)value = 1;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t n) { (void)p, (void)d, (void)n; return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { (void)p, (void)n; return cudaSuccess; }
cudaError_t cudaDeviceGetGraphMemAttribute(int d, enum cudaGraphMemAttributeType a, void *v) { (void)d, (void)a; *(uint64_t *)v = 0; return cudaSuccess; }
cudaError_t cudaDeviceSetGraphMemAttribute(int d, enum cudaGraphMemAttributeType a, void *v) { (void)d, (void)a, (void)v; return cudaSuccess; }
cudaError_t cudaDeviceGraphMemTrim(int d) { (void)d; return cudaSuccess; }

/* ------------------------------------------------------------------ device */

static __thread int current_device;

int fakecuda_devices(void) { init(); return card.devices; }
int fakecuda_mig(void) { init(); return card.mig; }
int fakecuda_driver(void) { init(); return card.driver; }
unsigned char fakecuda_uuid(int device, int at) { return (unsigned char)("fake-cuda-device"[at] + (at == 15 ? device : 0)); }

/* Which cards CUDA_VISIBLE_DEVICES shows: numbers up to the first that is none, or one slice by its name. */
static int visible[16];
static int visible_devices(void) {
    init();
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0;
    if (card.mig) { /* a process sees one slice, the first if it names none */
        visible[0] = 0;
        return card.devices && (!text || !strcmp(text, "0") || !strncmp(text, "MIG-", 4));
    }
    if (!text)
        for (; count < card.devices && count < 16; count++) visible[count] = count;
    for (const char *at = text; at && *at && count < 16;) {
        char *end;
        long device = strtol(at, &end, 10);
        if (end == at || device < 0 || device >= card.devices) break;
        visible[count++] = (int)device;
        at = *end == ',' ? end + 1 : NULL;
    }
    return count;
}

cudaError_t cudaGetDeviceCount(int *out) {
    *out = 0;
    init();
    if (card.driver / 1000 < CUDART_VERSION / 1000) return fail(cudaErrorInsufficientDriver);
    *out = visible_devices();
    return *out ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *out) { *out = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= visible_devices()) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaInitDevice(int device, unsigned a, unsigned b) { (void)a, (void)b; return cudaSetDevice(device); }
cudaError_t cudaDeviceReset(void) { return cudaSuccess; }
cudaError_t cudaSetDeviceFlags(unsigned flags) { (void)flags; return cudaSuccess; }
cudaError_t cudaGetDeviceFlags(unsigned *flags) { *flags = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *out) { *out = fakecuda_driver(); return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *out) { *out = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) { (void)a, (void)b; *out = 0; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { (void)peer, (void)flags; return fail(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, (size_t)size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetByPCIBusId(int *out, const char *id) { (void)id; *out = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetLimit(size_t *out, enum cudaLimit limit) { *out = limit == cudaLimitStackSize ? 1024 : 8 << 20; return cudaSuccess; }
cudaError_t cudaDeviceSetLimit(enum cudaLimit limit, size_t value) { (void)limit, (void)value; return cudaSuccess; }
cudaError_t cudaDeviceGetCacheConfig(enum cudaFuncCache *out) { *out = cudaFuncCachePreferNone; return cudaSuccess; }
cudaError_t cudaDeviceSetCacheConfig(enum cudaFuncCache config) { (void)config; return cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    init();
    if (device < 0 || device >= visible_devices()) return fail(cudaErrorInvalidDevice);
    memset(out, 0, sizeof *out);
    device = visible[device];
    snprintf(out->name, sizeof out->name, device ? "%s, the other" : card.mig ? "%s MIG 1g.5gb" : "%s", card.name);
    for (int at = 0; at < 16; at++) out->uuid.bytes[at] = (char)fakecuda_uuid(device, at);
    out->totalGlobalMem = card.total;
    out->sharedMemPerBlock = 48 << 10;
    out->sharedMemPerBlockOptin = card.shared_optin;
    out->sharedMemPerMultiprocessor = card.shared_per_sm;
    out->reservedSharedMemPerBlock = 1024;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->warpSize = 32;
    out->memPitch = 2147483647;
    out->maxThreadsPerBlock = 1024;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->totalConstMem = 65536;
    out->major = card.major, out->minor = card.minor;
    out->textureAlignment = 512, out->texturePitchAlignment = 32, out->surfaceAlignment = 512;
    out->multiProcessorCount = card.sms;
    out->canMapHostMemory = out->concurrentKernels = out->unifiedAddressing = out->streamPrioritiesSupported = 1;
    out->globalL1CacheSupported = out->localL1CacheSupported = out->managedMemory = 1;
    out->concurrentManagedAccess = out->computePreemptionSupported = out->cooperativeLaunch = 1;
    out->canUseHostPointerForRegisteredMem = out->hostRegisterSupported = out->memoryPoolsSupported = 1;
    out->pciBusID = device + 1;
    out->asyncEngineCount = 2;
    out->memoryBusWidth = 192;
    out->l2CacheSize = (int)card.l2;
    out->maxThreadsPerMultiProcessor = card.threads_per_sm;
    out->maxBlocksPerMultiProcessor = card.blocks_per_sm;
    out->clusterLaunch = card.major >= 9;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch ((int)attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *out = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *out = 64; break;
    case cudaDevAttrMaxGridDimX: *out = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *out = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *out = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *out = 1024; break;
    case cudaDevAttrTotalConstantMemory: *out = 65536; break;
    case cudaDevAttrWarpSize: *out = 32; break;
    case cudaDevAttrMaxPitch: *out = 2147483647; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *out = 65536; break;
    case cudaDevAttrClockRate: *out = 1777000; break;
    case cudaDevAttrMemoryClockRate: *out = 7501000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *out = p.memoryBusWidth; break;
    case cudaDevAttrTextureAlignment: case cudaDevAttrSurfaceAlignment: *out = 512; break;
    case cudaDevAttrTexturePitchAlignment: *out = 32; break;
    case cudaDevAttrMultiProcessorCount: *out = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *out = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *out = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *out = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrAsyncEngineCount: *out = 2; break;
    case cudaDevAttrComputeCapabilityMajor: *out = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *out = p.minor; break;
    case cudaDevAttrPciBusId: *out = 1; break;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio: *out = 32; break;
    case cudaDevAttrClusterLaunch: *out = p.clusterLaunch; break;
    case cudaDevAttrGpuOverlap: case cudaDevAttrCanMapHostMemory: case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrStreamPrioritiesSupported: case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported: case cudaDevAttrManagedMemory: case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrComputePreemptionSupported: case cudaDevAttrCooperativeLaunch: case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported: case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case 102: /* virtual memory management, known to the driver alone */
        *out = 1; break;
    default: *out = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaChooseDevice(int *out, const struct cudaDeviceProp *p) { (void)p; *out = 0; return cudaSuccess; }

/* ------------------------------------------------------------------ what the compiler's code calls */

static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed[16];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    if (depth == 16) return 1;
    pushed[depth].grid = grid, pushed[depth].block = block, pushed[depth].shared = shared, pushed[depth].stream = stream;
    depth++;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth) return fail(cudaErrorMissingConfiguration);
    depth--;
    *grid = pushed[depth].grid, *block = pushed[depth].block, *shared = pushed[depth].shared;
    *(cudaStream_t *)stream = pushed[depth].stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *) + sizeof binary); }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
char __cudaInitModule(void **handle) { (void)handle; return 1; }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *tid,
                            uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
    (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    pthread_mutex_lock(&lock);
    find_kernel(host, name);
    pthread_mutex_unlock(&lock);
}

struct variable { const void *host; size_t size; void *device; struct variable *next; };
static struct variable *variables;
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int ext, size_t size, int constant, int global) {
    (void)handle, (void)device, (void)name, (void)ext, (void)constant, (void)global;
    struct variable *v = calloc(1, sizeof *v);
    pthread_mutex_lock(&lock);
    *v = (struct variable){host, size, NULL, variables};
    variables = v;
    pthread_mutex_unlock(&lock);
}
void __cudaRegisterManagedVar(void **handle, void **host, char *device, const char *name, int ext, size_t size, int constant, int global) {
    *host = calloc(1, size ? size : 1);
    __cudaRegisterVar(handle, (char *)host, device, name, ext, size, constant, global);
}
static struct variable *find_variable(const void *host) {
    pthread_mutex_lock(&lock);
    struct variable *v = variables;
    while (v && v->host != host) v = v->next;
    if (v && !v->device) v->device = calloc(1, v->size ? v->size : 1); /* part of the module: no budget */
    pthread_mutex_unlock(&lock);
    return v;
}
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
    struct variable *v = find_variable(symbol);
    if (!v) return fail(cudaErrorInvalidSymbol);
    *out = v->device;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolSize(size_t *out, const void *symbol) {
    struct variable *v = find_variable(symbol);
    if (!v) return fail(cudaErrorInvalidSymbol);
    *out = v->size;
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    (void)kind;
    struct variable *v = find_variable(symbol);
    if (!v) return fail(cudaErrorInvalidSymbol);
    if (offset + bytes > v->size) return fail(cudaErrorInvalidValue);
    memcpy((char *)v->device + offset, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void *symbol, const void *from, size_t bytes, size_t offset, enum cudaMemcpyKind kind, cudaStream_t s) {
    (void)s;
    return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    (void)kind;
    struct variable *v = find_variable(symbol);
    if (!v) return fail(cudaErrorInvalidSymbol);
    if (offset + bytes > v->size) return fail(cudaErrorInvalidValue);
    memcpy(to, (char *)v->device + offset, bytes);
    return cudaSuccess;
}

static struct kernel *kernel_of(const void *host) { /* a function's address, or the handle of a kernel */
    pthread_mutex_lock(&lock);
    struct kernel *k = find_kernel(host, NULL);
    pthread_mutex_unlock(&lock);
    return k;
}
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *host) { *out = (cudaKernel_t)kernel_of(host); return cudaSuccess; }
cudaError_t cudaGetKernel(cudaKernel_t *out, const void *host) { return __cudaGetKernel(out, host); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return fakecuda_launch(kernel, grid, block, shared, stream, args);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return fakecuda_launch(kernel, grid, block, shared, stream, args);
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return fakecuda_launch(kernel_of(host), grid, block, shared, stream, args);
}
cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return fakecuda_launch(kernel_of(host), grid, block, shared, stream, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **args) {
    return fakecuda_launch(kernel_of(host), config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, args);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *host) {
    init();
    memset(out, 0, sizeof *out);
    struct kernel *k = kernel_of(host);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    out->ptxVersion = out->binaryVersion = card.major * 10 + card.minor;
    out->maxDynamicSharedSizeBytes = (int)k->shared_limit;
    out->preferredShmemCarveout = -1;
    return cudaSuccess;
}
cudaError_t cudaFuncGetName(const char **out, const void *host) {
    struct kernel *k = kernel_of(host);
    *out = k->name ? k->name : "?";
    return cudaSuccess;
}
static cudaError_t set_attribute(struct kernel *k, enum cudaFuncAttribute attribute, int value) {
    init();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > card.shared_optin) return fail(cudaErrorInvalidValue);
    k->shared_limit = (size_t)value > (48 << 10) ? (size_t)value : 48 << 10;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) {
    return set_attribute(kernel_of(host), attribute, value);
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device) {
    (void)device;
    return set_attribute((struct kernel *)kernel, attribute, value);
}
cudaError_t cudaFuncSetCacheConfig(const void *host, enum cudaFuncCache config) { (void)host, (void)config; return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *host, int threads, size_t shared, unsigned flags) {
    (void)host, (void)flags;
    init();
    if (threads < 1 || threads > 1024) return fail(cudaErrorInvalidValue);
    int blocks = card.threads_per_sm / ((threads + 31) / 32 * 32);
    if (blocks > card.blocks_per_sm) blocks = card.blocks_per_sm;
    if (shared && (size_t)blocks > card.shared_per_sm / (shared + 1024)) blocks = (int)(card.shared_per_sm / (shared + 1024));
    *out = blocks;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *host, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(out, host, threads, shared, 0);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t *out, const void *host, int blocks, int threads) {
    (void)host, (void)threads;
    init();
    *out = blocks > 0 ? card.shared_per_sm / (size_t)blocks - 1024 : 0;
    if (*out > card.shared_optin) *out = card.shared_optin;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int *out, const void *host, const cudaLaunchConfig_t *config) {
    (void)host, (void)config;
    *out = 8;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int *out, const void *host, const cudaLaunchConfig_t *config) {
    (void)host, (void)config;
    *out = card.sms / 8;
    return cudaSuccess;
}

/* Code loaded at run time: any name is found in it. */
cudaError_t cudaLibraryLoadData(cudaLibrary_t *out, const void *code, enum cudaJitOption *a, void **b, unsigned c,
                                enum cudaLibraryOption *d, void **e, unsigned f) {
    (void)code, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    *out = (cudaLibrary_t)malloc(1);
    return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t library) { free((void *)library); return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t *out, cudaLibrary_t library, const char *name) {
    (void)library;
    *out = (cudaKernel_t)fakecuda_kernel_named(name);
    return cudaSuccess;
}

/* The driver's functions, for those who ask the runtime for them. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    (void)version, (void)flags;
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    char name[160];
    void *found = NULL;
    static const char *const ENDINGS[] = {"_v2", ""};
    for (int i = 0; driver && !found && i < 2; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, ENDINGS[i]);
        found = dlsym(driver, name);
    }
    *out = found;
    if (status) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return found || status ? cudaSuccess : fail(cudaErrorSymbolNotFound);
}
cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **out, unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    return cudaGetDriverEntryPointByVersion(symbol, out, CUDART_VERSION, flags, status);
}
