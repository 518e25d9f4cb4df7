/* SPDX-License-Identifier: MIT */
/*
 * The same from C++: owners that destroy, configuration without C's designated
 * initialisers, a listener as a class.
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include <kage/kage.h>
#include <kage/backend.h>

#include "leak.h"

namespace {

constexpr uint64_t bytes = 4u << 20;

void must(bool ok, const char *what)
{
	if (ok)
		return;
	std::fprintf(stderr, "embed.cpp: %s\n", what);
	std::exit(1);
}

template <class T> T config()
{
	T t;
	std::memset(&t, 0, sizeof(t));
	t.size = sizeof(t);
	return t;
}

struct drop {
	void operator()(kage_engine *e) const { must(kage_engine_destroy(e) == KAGE_OK, "engine destroyed"); }
	void operator()(kage_vm *v) const { must(kage_vm_destroy(v) == KAGE_OK, "guest destroyed"); }
	void operator()(kage_vcpu *c) const { kage_vcpu_destroy(c); }
};
using engine = std::unique_ptr<kage_engine, drop>;
using guest = std::unique_ptr<kage_vm, drop>;
using vcpu = std::unique_ptr<kage_vcpu, drop>;

/* Counts what it hears. */
struct listener : kage_notifier {
	unsigned starts = 0, ends = 0;

	explicit listener(kage_vm *vm) : kage_notifier()
	{
		must(kage_notifier_register(vm, this, &table) == KAGE_OK, "listener registered");
	}
	~listener() { must(kage_notifier_unregister(this) == KAGE_OK, "listener unregistered"); }

	static int start(kage_notifier *n, const kage_range *)
	{
		static_cast<listener *>(n)->starts++;
		return 0;
	}
	static void end(kage_notifier *n, const kage_range *) { static_cast<listener *>(n)->ends++; }
	static const kage_notifier_ops table;
};
const kage_notifier_ops listener::table = { &listener::start, &listener::end, nullptr, nullptr, nullptr };

vcpu make_vcpu(kage_vm *vm)
{
	auto c = config<kage_vcpu_config>();
	kage_vcpu *out = nullptr;

	c.abi = KAGE_VCPU_ABI;
	must(kage_vcpu_create(vm, &c, &out) == KAGE_OK, "vCPU created");
	return vcpu(out);
}

void fill(kage_vm *vm, uint64_t salt)
{
	vcpu cpu = make_vcpu(vm);

	for (uint64_t gva = 0; gva < bytes; gva += KAGE_PAGE_SIZE) {
		uint64_t seen = 0, word = gva + salt;
		must(kage_vcpu_store(cpu.get(), gva, &word, sizeof(word), nullptr) == KAGE_OK, "store");
		must(kage_vcpu_load(cpu.get(), gva, &seen, sizeof(seen), nullptr) == KAGE_OK, "load");
		must(seen == word, "what was stored is loaded");
	}
}

guest make_guest(kage_engine *e)
{
	auto region = config<kage_region>();
	kage_vm *out = nullptr;

	must(kage_vm_create(e, nullptr, &out) == KAGE_OK, "guest created");
	region.len = bytes;
	must(kage_vm_map(out, &region) == KAGE_OK, "region mapped");
	return guest(out);
}

void workload()
{
	kage_engine *e = nullptr;
	must(kage_engine_create(nullptr, &e) == KAGE_OK, "engine created");
	engine owner(e);
	guest parent = make_guest(e);
	fill(parent.get(), 0);

	std::vector<guest> clones;
	for (int i = 0; i < 8; i++) {
		kage_vm *out = nullptr;
		must(kage_vm_clone(parent.get(), nullptr, &out) == KAGE_OK, "clone");
		clones.emplace_back(out);
	}
	{
		listener ear(parent.get());
		std::thread one([&] { fill(clones[0].get(), 1); }), two([&] { fill(parent.get(), 2); });
		one.join();
		two.join();
		must(kage_vm_advise(parent.get(), 0, bytes / 2, KAGE_ADVICE_DISCARD) == KAGE_OK, "discard");
		must(ear.starts > 0 && ear.starts == ear.ends, "every start has its end");
	}
	for (uint64_t i = 0; i < clones.size(); i++) {
		uint64_t word = 0;
		must(kage_vm_read(clones[i].get(), bytes - KAGE_PAGE_SIZE, &word, sizeof(word)) == KAGE_OK, "read");
		must(word == bytes - KAGE_PAGE_SIZE + (i == 0), "every clone reads its own bytes");
	}
	must(kage_engine_step(e, nullptr, nullptr) == KAGE_OK, "step");
}

}

int main()
{
	leak before = leak_take();

	workload();
	workload();
	if (leak_check(&before))
		return 1;
	std::puts("C++: threads and descriptors as before");
	return 0;
}
