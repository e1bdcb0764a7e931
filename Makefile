VERSION ?= dev
LOCK ?= redlock
QUEUE ?= embedded
PROGRAM := bin/at-least-semaphore-pod-hook

.PHONY: help
help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: build bin/demo ## show the main job from start to end; needs only Go. LOCK=etcd: the other lock, QUEUE=sentinel: a failover, V=-v: flags and patches
	@bin/demo $(V) $(demo-queue) $(demo-lock) story

.PHONY: test-demo
test-demo: test-needs ## test the demo with each lock and queue, its printed commands, and Ctrl-C
	SUITE=1 go test -race -count=1 -v ./test/demo

.PHONY: run
run: build bin/demo ## start the demo's set-up and keep it up; prints what to try by hand
	@bin/demo $(demo-queue) $(demo-lock) run

# etcd is built from its module; the go command caches it.
etcd = $(shell go tool -modfile=test/tools/go.mod -n go.etcd.io/etcd/server/v3)
demo-lock = $(if $(filter redlock,$(LOCK)),,$(if $(filter etcd,$(LOCK)),-etcd $(etcd),$(error LOCK is $(LOCK): it must be redlock or etcd)))

# Real servers, which must be installed.
REDIS_SERVER ?= redis-server
demo-queue = $(if $(filter embedded,$(QUEUE)),,$(if $(filter sentinel,$(QUEUE)),-sentinels $(REDIS_SERVER),$(error QUEUE is $(QUEUE): it must be embedded or sentinel)))

go-build = CGO_ENABLED=0 go build -trimpath -tags grpcnotrace -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: build
build: ## build the static binary into bin/, without gRPC's tracing (a fifth of its size)
	@$(go-build) -o $(PROGRAM) .

.PHONY: bin/demo
bin/demo:
	@go build -C demo -o ../bin/demo .

RACE ?=

.PHONY: test
test: test-needs ## run all tests; installs redis-server, gcc, curl, promtool and openssl if missing; RACE=-race: the root's with the race detector, as in CI
	@$(MAKE) --no-print-directory -j2 test-root test-folders

.PHONY: test-root
test-root:
	go test $(RACE) -count=1 -vet=off -parallel $(if $(RACE),16,24) -shuffle=on .

# The suites in folders of their own that have tests for "make test".
.PHONY: test-folders
test-folders:
	go test -count=1 -vet=off -parallel 8 -shuffle=on $(addprefix ./test/,chaos deploy layers model monitoring rig)

.PHONY: test-timing
test-timing: test-needs ## run the unit tests and the failovers with their time limits; needs an idle machine
	TIMING=1 go test -count=1 -parallel 4 .
	TIMING=1 SUITE=1 go test -count=1 -parallel 1 -timeout 20m -v -run 'Failover|SlotsMove|NewPrimary' ./test/failover

.PHONY: test-queues
test-queues: test-needs ## fail over Sentinel groups, Clusters, addresses and gates under load; run the unit tests on a Sentinel and a Cluster
	SUITE=1 go test -race -count=1 -parallel 5 -timeout 20m -v ./test/failover
	TEST_QUEUE=sentinel go test -race -count=1 -vet=off -parallel 16 -shuffle=on .
	TEST_QUEUE=cluster go test -race -count=1 -vet=off -parallel 16 -shuffle=on .

.PHONY: test-abuse
test-abuse: test-needs ## misuse a webhook in many ways; check its memory and the admissions beside it; about 5 minutes
	SUITE=1 go test -count=1 -timeout 15m -v ./test/abuse

.PHONY: test-page
test-page: test-needs ## show the page of status to a real Chromium; installs chromium if missing
	@command -v chromium >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null; }
	SUITE=1 go test -count=1 -v ./test/page $(PAGE_FLAGS)

.PHONY: page-picture
page-picture: ## draw docs/status-page.png
	$(MAKE) test-page PAGE_FLAGS="-run TestPage -picture=$(CURDIR)/docs/status-page.png"

.PHONY: test-upgrade
test-upgrade: test-needs ## upgrade from the last release under load, and back; about a minute; needs the git history
	SUITE=1 go test -count=1 -timeout 15m -v -skip Broken ./test/upgrade

CHAOS_TIME ?= 1m
CHAOS_SEED ?= 1
CHAOS_FLAGS ?=

.PHONY: chaos
chaos: test-needs ## fail pods, gates and servers at random, check the history; CHAOS_TIME=1h CHAOS_SEED=2
	SUITE=1 go test -count=1 -timeout 0 -v -run '^TestChaos' -skip Broken ./test/chaos -chaos.time=$(CHAOS_TIME) -chaos.seed=$(CHAOS_SEED) $(CHAOS_FLAGS)

.PHONY: test-broken
test-broken: test-needs ## break program and scripts in many ways, prove that chaos, the model and the upgrade find each; about 8 minutes
	SUITE=1 go test -count=1 -p 1 -parallel 4 -timeout 0 -v -run 'FindsBroken' ./test/chaos ./test/model ./test/upgrade

FUZZ_TIME ?= 10s

.PHONY: fuzz
fuzz: ## fuzz decoder, annotations, patch, flags and Redis's replies; FUZZ_TIME=10m for each
	for f in $$(grep -ho '^func Fuzz[A-Za-z]*' *_test.go | cut -c 6-); do \
		go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZ_TIME) -fuzzminimizetime 1s . || exit 1; done

.PHONY: test-all
test-all: export RACE = -race
test-all: lint test test-page test-upgrade test-queues test-abuse chaos test-broken fuzz demo test-demo test-dist bench test-timing ## run all suites but the cluster tests, and all unit tests and the model on a Sentinel and a Cluster; needs an idle machine
	for queue in sentinel cluster; do TEST_QUEUE=$$queue go test -race -count=1 -parallel 8 -run '^Test' . ./test/model || exit 1; done

.PHONY: test-needs
test-needs:
	@./.ci/need redis-server:redis-server gcc:gcc:libc6-dev curl:curl promtool:prometheus openssl:openssl

# How to load the image into the cluster, run a script on its node, and restart a
# component of it, for the cluster tests. These are for kind. For k3d:
#   LOAD_IMAGE='docker build -t $$IMAGE . && k3d image import $$IMAGE' NODE_SHELL='docker exec k3d-k3s-default-server-0 sh -c'
export LOAD_IMAGE ?= docker build -t $$IMAGE . && kind load docker-image $$IMAGE
export NODE_SHELL ?= docker exec kind-control-plane sh -c
# On kind's node, systemd restarts kubelet and containerd, and the kubelet the rest.
export NODE_RESTART ?= docker exec kind-control-plane pkill -$$SIGNAL -f "^([^ ]*/)?(kube-)?$$COMPONENT( |\$$)"
E2E_FLAGS ?=

e2e-test = PROGRAM=$(CURDIR)/$(PROGRAM) IMAGE=at-least-semaphore-pod-hook:e2e-$$(sha256sum $(PROGRAM) | cut -c1-12) go test -count=1

.PHONY: e2e
e2e: build ## test deploy/ on the cluster of KUBECONFIG: installs and removes it; settings: test/e2e/setup_test.go
	$(if $(E2E_FLAGS),,go test -count=1 -tags e2e -timeout 10m -parallel 5 -run '^TestKubernetes' .)
	$(e2e-test) -tags e2e -timeout 55m -parallel 5 -v $(E2E_FLAGS) ./test/e2e

.PHONY: e2e-sentinel
e2e-sentinel: build ## the same for deploy/sentinel: lose its primary in all ways, under load
	DEPLOY=deploy/sentinel $(e2e-test) -tags e2e -timeout 55m -v -run '^TestSentinel' $(E2E_FLAGS) ./test/e2e

.PHONY: measure
measure: build ## measure waiting pods on the cluster, about 45 minutes; E2E_FLAGS='-run X' for one of test/e2e/measure_*_test.go
	MEASURE=1 $(e2e-test) -tags e2e -timeout 120m -v -run '^TestMeasure' $(E2E_FLAGS) ./test/e2e

.PHONY: measure-sidecars
measure-sidecars: test-needs ## measure up to 1,000 waiting sidecars on one Redis, about 10 minutes; needs no cluster
	SUITE=1 go test -count=1 -timeout 30m -v -run '^TestMeasureWaiters$$' ./test/bench

.PHONY: measure-gate
measure-gate: test-needs ## measure 5,000 gated pods of 50 semaphores, about 3 minutes; needs no cluster
	SUITE=1 go test -count=1 -timeout 15m -v -run '^TestMeasureGate$$' ./test/bench

BENCH_ROUNDS ?= 15

.PHONY: bench
bench: test-needs ## measure admissions beside an empty server, about 3 minutes; BENCH_ROUNDS=50 for more precision
	SUITE=1 BENCH_ROUNDS=$(BENCH_ROUNDS) go test -count=1 -timeout 60m -v -run '^TestBench$$' ./test/bench
	go test -run '^$$' -bench . .

SIDECAR_TIME ?= 10m

.PHONY: bench-sidecar
bench-sidecar: test-needs ## measure sidecars for SIDECAR_TIME=10m, then 10,000 simulated ones for 6 minutes; fails above the limits
	SUITE=1 SIDECAR_TIME=$(SIDECAR_TIME) go test -count=1 -timeout 0 -v -run '^TestBench(Many)?Sidecars?(TLS)?$$' ./test/bench

OTHERS ?= redis-semaphore@5.8.0 ioredis@6.0.0

.PHONY: bench-others
bench-others: test-needs ## compare acquire and release with an npm package and a plain script, about a minute; needs Node.js and npm
	@./.ci/need node:nodejs npm:npm
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		npm install --prefix "$$folder" --silent --no-audit --no-fund --ignore-scripts $(OTHERS) && \
		NODE_PATH="$$folder/node_modules" SUITE=1 BENCH_ROUNDS=$(BENCH_ROUNDS) go test -count=1 -timeout 15m -v -run '^TestBenchOthers$$' ./test/bench

HERD_AT_ONCE ?= 5000

.PHONY: bench-growth
bench-growth: test-needs ## measure 10 to 10,000 holders and waiters, how long repairs block Redis, and HERD_AT_ONCE=5000 pods at once
	SUITE=1 HERD_AT_ONCE=$(HERD_AT_ONCE) go test -count=1 -timeout 10m -v -run '^TestBench(Growth|Repair|Herd)$$' ./test/bench

.PHONY: bench-memory
bench-memory: test-needs ## measure a webhook's memory over a million admissions, about 10 minutes; MEMORY_ADMISSIONS=100000 for fewer
	SUITE=1 go test -count=1 -timeout 120m -v -run '^TestBenchMemory$$' ./test/bench

.PHONY: dashboard-picture
dashboard-picture: test-needs ## draw docs/dashboard.svg from the data of a real Prometheus, about 5 minutes
	SUITE=1 go test -count=1 -timeout 15m -run TestDrawDashboard ./test/monitoring

DIST ?= dist
RELEASE_IMAGE ?= ghcr.io/kaidotio/at-least-semaphore-pod-hook:$(VERSION)

# Manifests of a release: NAME:FOLDER, for those folders that there are.
dist-manifests = $(foreach m,install:deploy gate:deploy/gate status:deploy/status etcd:deploy/etcd sentinel:deploy/sentinel,\
	$(if $(wildcard $(lastword $(subst :, ,$(m)))),$(m)))
# As in the image, the binaries contain no commit: see the Dockerfile.
dist-platforms = linux-amd64 linux-arm64 darwin-amd64 darwin-arm64

.PHONY: dist
dist: ## collect a release in dist/: manifests, examples, binaries, licences, checksums; VERSION=v1.2.3 RELEASE_IMAGE=...
	@command -v kubectl >/dev/null || { echo "kubectl is missing, which has kustomize: see https://kubernetes.io/docs/tasks/tools/" >&2; exit 1; }
	rm -rf $(DIST) && mkdir -p $(DIST)
	for m in $(dist-manifests); do \
		kubectl kustomize "$${m#*:}" >$(DIST)/manifest && \
		sed 's|ghcr.io/kaidotio/at-least-semaphore-pod-hook:v[0-9.]*|$(RELEASE_IMAGE)|' $(DIST)/manifest >"$(DIST)/$${m%:*}.yaml" || exit 1; done
	rm $(DIST)/manifest
	for example in $(notdir $(wildcard deploy/examples/*.yaml)); do cp "deploy/examples/$$example" "$(DIST)/example-$$example" || exit 1; done
	$(foreach script,$(wildcard deploy/*.sh),cp $(script) $(DIST)/ &&) cp deploy/cert-manager/certificate.yaml $(DIST)/cert-manager.yaml
	cp deploy/monitoring/rules.yaml deploy/monitoring/dashboard.json $(DIST)/
	(.ci/prometheus-rule && echo --- && cat deploy/monitoring/podmonitor.yaml) >$(DIST)/monitoring.yaml
	for p in $(dist-platforms); do \
		GOOS=$${p%-*} GOARCH=$${p#*-} $(go-build) -buildvcs=false -o "$(DIST)/at-least-semaphore-pod-hook-$$p" . || exit 1; done
	.ci/licences $(DIST)/at-least-semaphore-pod-hook-* >$(DIST)/licences.txt
	cd $(DIST) && sha256sum * >checksums && mv checksums checksums.txt

.PHONY: test-dist
test-dist: test-needs ## test what "make dist" makes; needs kubectl
	SUITE=1 go test -count=1 -timeout 20m -v -run '^TestDist$$' ./test/deploy

.PHONY: dev
dev: ## develop on the current cluster with Skaffold: build, deploy and forward ports on each change
	@command -v skaffold >/dev/null || { echo "skaffold is missing: see https://skaffold.dev/docs/install/" >&2; exit 1; }
	skaffold dev --filename=deploy/dev/skaffold.yaml --port-forward

.PHONY: lint
lint: ## check format, vet, staticcheck, the shell scripts of deploy/ and the workflows; installs shellcheck if missing
	@./.ci/need shellcheck:shellcheck
	@test -z "$$(gofmt -l .)" || { echo "not gofmt-ed:"; gofmt -l .; exit 1; }
	go vet -tags e2e ./...
	go -C demo vet ./...
	go tool -modfile=test/tools/go.mod staticcheck -tags e2e ./...
	shellcheck --shell=sh --external-sources --source-path=SCRIPTDIR deploy/sentinel/*.sh
	go tool -modfile=test/tools/go.mod actionlint
