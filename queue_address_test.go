package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestQueueAddresses(t *testing.T) {
	for text, want := range map[string]queueAddress{
		"redis:6379":                   {queueServerAlone, []string{"redis:6379"}, "", ""},
		"rediss://redis:6379":          {queueServerAlone, []string{"rediss://redis:6379"}, "", ""},
		"redis+sentinel://a:1,b:2/m":   {queueSentinel, []string{"a:1", "b:2"}, "m", ""},
		"rediss+sentinel://a:1/m-.1":   {queueSentinel, []string{"rediss://a:1"}, "m-.1", ""},
		"redis+cluster://a:1, [::1]:2": {queueCluster, []string{"a:1", "[::1]:2"}, "", ""},
		"rediss+cluster://a:1":         {queueCluster, []string{"rediss://a:1"}, "", ""},
	} {
		got, err := readQueueAddress(text)
		if err != nil || got.kind != want.kind || !slices.Equal(got.servers, want.servers) || got.name != want.name || got.text != text {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"redis+sentinel://a:1":       "the name of the primary is missing (an example: " + sentinelExample + ")",
		"redis+sentinel://a:1/":      "the name of the primary is missing",
		"redis+sentinel://a/m,n":     `"m,n" is no name of a primary: it has letters, digits, and the characters ._- only; "a" is not HOST:PORT (an example: `,
		"redis+cluster://a:1,a:1":    `"a:1" is named twice (an example: ` + clusterExample + ")",
		"redis+cluster://":           `"" is not HOST:PORT (an example`,
		"redis+ring://a:1":           `"redis+ring://" is no scheme: an address is HOST:PORT, or like ` + sentinelExample + " or " + clusterExample,
		"http+sentinel://a:1/m":      `"http+sentinel://" is no scheme`,
		"a:1,b:2":                    "is one address, not 2 (for a group of servers: " + sentinelExample + " or " + clusterExample + ")",
		"redis+sentinel://u:p@a:1/m": "there are no credentials in an address",
	} {
		if _, err := readQueueAddress(text); err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "u:p") {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// The sidecars get the address as it is, and the credentials of the Sentinels from their Secret.
func TestSidecarsOfASentinelGroup(t *testing.T) {
	env := map[string]string{"REDIS_SENTINEL_PASSWORD": "pa55word"}
	getenv := func(name string) string { return env[name] }
	const address = "rediss+sentinel://a:1,b:2/tokens"
	for args, want := range map[string]string{
		"--queue-redis-address=" + address:                   "--sidecar-redis-secret: is needed where REDIS_PASSWORD or REDIS_SENTINEL_PASSWORD is set",
		"--queue-redis-address=a:1 --sidecar-redis-secret=s": "REDIS_SENTINEL_PASSWORD is not used: --queue-redis-address names no Sentinels",
	} {
		if _, err := parseWebhookConfig(strings.Fields(args), getenv); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
	c, err := parseWebhookConfig([]string{"--queue-redis-address=" + address, "--sidecar-redis-secret=s"}, getenv)
	rig.Must(t, err)
	sidecar, _ := sidecarContainer(c, resourcesBurstable.resources(c), testID, testSpec, testToken)
	if !slices.Contains(sidecar.Args, "--queue-redis-address="+address) {
		t.Errorf("args %v", sidecar.Args)
	}
	optional := map[string]bool{}
	for _, e := range sidecar.Env {
		if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
			optional[e.Name+" "+e.ValueFrom.SecretKeyRef.Key] = *e.ValueFrom.SecretKeyRef.Optional
		}
	}
	for name, want := range map[string]bool{"REDIS_PASSWORD password": true, "REDIS_USERNAME username": true,
		"REDIS_SENTINEL_USERNAME sentinel-username": true, "REDIS_SENTINEL_PASSWORD sentinel-password": false} {
		if got, ok := optional[name]; !ok || got != want {
			t.Errorf("%s: optional %t, %t", name, got, ok)
		}
	}
	env["REDIS_SENTINEL_USERNAME"], env["REDIS_SENTINEL_PASSWORD"] = "a", ""
	if _, err := parseWebhookConfig(nil, getenv); err == nil || err.Error() != "REDIS_SENTINEL_USERNAME is set and REDIS_SENTINEL_PASSWORD is not" {
		t.Error(err)
	}
}
