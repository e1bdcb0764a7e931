//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// asSetup is kubectl with the rights of setup.
func asSetup(input string, args ...string) (string, error) {
	return kubectl(input, append([]string{"--as=system:serviceaccount:" + hookNamespace + ":setup"}, args...)...)
}

// The account of setup can do nothing with Secrets but what it needs. The token of another
// account is out of its reach.
func TestRightsOfSetup(t *testing.T) {
	t.Parallel()
	open, other := newNamespace(t), forgottenNamespace(t)
	secret := func(namespace, name, kind string) string {
		return encode(object{"apiVersion": "v1", "kind": "Secret", "type": kind,
			"metadata": object{"namespace": namespace, "name": name,
				"annotations": object{"kubernetes.io/service-account.name": "default"}}})
	}
	const given = "at-least-semaphore-pod-redis"
	for what, s := range map[string]string{
		"a token of an account of its own namespace":  secret(hookNamespace, "token", "kubernetes.io/service-account-token"),
		"a token of an account of a labelled one":     secret(open.name, given, "kubernetes.io/service-account-token"),
		"another Secret of a labelled namespace":      secret(open.name, "another", "Opaque"),
		"the Secret of a namespace without the label": secret(other.name, given, "Opaque"),
		"a Secret of kube-system":                     secret("kube-system", given, "Opaque"),
		"a token of kube-system":                      secret("kube-system", "token", "kubernetes.io/service-account-token"),
	} {
		if out, err := asSetup(s, "create", "-f", "-"); err == nil || !strings.Contains(err.Error(), "orbidden") {
			t.Errorf("setup may create %s: %s, %v", what, out, err)
		}
	}
	other.kubectl("create", "secret", "generic", given)
	other.kubectl("create", "secret", "generic", "theirs")
	refused := [][]string{
		{"-n", other.name, "get", "secret", "theirs"}, {"-n", other.name, "delete", "secret", "theirs"},
		{"-n", other.name, "get", "secrets"}, {"get", "secrets", "-A"},
		{"-n", other.name, "label", "secret", given, "a=b"}, // the policy: the namespace has no label
		{"label", "namespace", other.name, "a=b"}, {"-n", hookNamespace, "delete", "pod", "--all"},
		{"delete", "mutatingwebhookconfiguration", hookNamespace}, {"-n", hookNamespace, "create", "token", "webhook"},
		{"-n", hookNamespace, "get", "configmap", "settings"},
	}
	for _, args := range refused {
		if out, err := asSetup("", args...); err == nil || !strings.Contains(err.Error(), "orbidden") {
			t.Errorf("setup may %s: %s, %v", strings.Join(args, " "), out, err)
		}
	}
	if _, err := asSetup("", "-n", open.name, "get", "secret", given); err != nil {
		t.Error(err)
	}
}

// Many namespaces are labelled at once.
func TestManyNamespaces(t *testing.T) {
	t.Parallel()
	const namespaces = 200
	prefix := forgottenNamespace(t).name
	var list []object
	for i := range namespaces {
		list = append(list, object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{
			"name":   fmt.Sprintf("%s-%d", prefix, i),
			"labels": object{"e2e": "at-least-semaphore-pod-hook", "e2e-many": prefix, labelSidecars: "true"}}})
	}
	t.Cleanup(func() {
		_, err := kubectl("", "delete", "namespace", "-l", "e2e-many="+prefix, "--wait=false")
		must(t, err)
	})
	start := time.Now()
	_, err := kubectl(encode(object{"apiVersion": "v1", "kind": "List", "items": list}), "create", "-f", "-")
	must(t, err)
	labelled := time.Since(start)
	eventually(t, patience, func() error {
		var secrets struct {
			Items []struct {
				Metadata struct{ Namespace string }
			}
		}
		if err := api.get("/api/v1/secrets?fieldSelector=metadata.name%3Dat-least-semaphore-pod-redis", &secrets); err != nil {
			return err
		}
		ready := 0
		for _, s := range secrets.Items {
			if strings.HasPrefix(s.Metadata.Namespace, prefix+"-") {
				ready++
			}
		}
		if ready < namespaces {
			return fmt.Errorf("%d of %d namespaces are ready", ready, namespaces)
		}
		return nil
	})
	t.Logf("%d namespaces were made within %s, and all were ready after %s", namespaces, inSeconds(labelled), inSeconds(time.Since(start)))
}

// What is applied again changes nothing, on the client's side and on the server's: setup
// writes what the manifests do not mention.
func TestApplyAgain(t *testing.T) {
	t.Parallel()
	configuring.Lock()
	defer configuring.Unlock()
	text, err := manifests(installed)
	must(t, err)
	for _, flags := range [][]string{nil, {"--server-side", "--force-conflicts"}} {
		if len(flags) > 0 {
			_, err := kubectl(text, append([]string{"apply", "-f", "-"}, flags...)...)
			must(t, err)
		}
		if out, err := kubectl(text, append([]string{"diff", "-f", "-"}, flags...)...); err != nil {
			t.Errorf("kubectl diff %v: %v\n%s", flags, err, out)
		}
	}
}
