// The functions of the CUDA driver that torch looks up directly.
#define P extern "C" __attribute__((visibility("default"))) int
static char handle[256];
P cuInit(unsigned) { return 0; }
P cuDriverGetVersion(int* v) { *v = 13000; return 0; }
P cuDeviceGet(int* d, int i) { *d = i; return 0; }
P cuCtxGetCurrent(void** c) { *c = handle; return 0; }
P cuCtxGetDevice(int* d) { *d = 0; return 0; }
P cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
P cuGetErrorString(int, const char** s) { *s = "error of the stand-in"; return 0; }
P cuGetErrorName(int, const char** s) { *s = "error of the stand-in"; return 0; }
